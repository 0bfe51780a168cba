// The frequency ODE of CLEX and its adaptive solution, one source for the host and for a CUDA block; no torch.
//
// R rotary pairs, M hidden units, s = ln(2t - 1), u_i = z_i + (i / (R-1)) s where z_i = ln freq_i:
//
//     du/ds = (e^s / 2) act(v @ up) @ down,    v_i = u_i - i (ln n / R + 2 s / (R-1)),    u_i(0) = -(i / R) ln b
//
// n is the NTK base, b the rotary base. The NTK part of dz/dt is an exact derivative and has left the equation, so only
// the MLP is integrated. DOP853 takes the steps; each step is continued between its ends by
//
//     u(x) = u_0 + x (F_0 + (1-x) (F_1 + x (F_2 + (1-x) (F_3 + x (F_4 + (1-x) (F_5 + x F_6)))))),   0 <= x <= 1,
//
// F_k = dense_change[k] (u_1 - u_0) + h sum_l dense[k][l] k_l. The times asked are read from that alone, so the steps,
// and with them the frequencies at a time, do not depend on which other times are asked.
//
// Backward is the adjoint of these operations, the step lengths held constant: with g_j the gradient to the input of
// stage j and G_k that to F_k,
//
//     dk_j = h (sum_{l>j} stage[l][j] g_l + sum_k dense[k][j] G_k),    g_j = J_j^T dk_j,
//
// where g_12 also holds what arrives at the end of the step. Nothing is stored but u at the step boundaries.
//
// A Team runs the loops: one thread with vector instructions, or a CUDA block. Each of its functions returns with the
// results visible to the whole team.
#pragma once

#include <cmath>
#include <cstdint>

#include "dop853.h"
#include "fast_math.h"

namespace clex {

constexpr int MAX_STEPS = 128;
constexpr int MAX_ATTEMPTS = 4 * MAX_STEPS;

// The largest local error allowed in any u_i, that is, in the relative error of any frequency. Over the released
// configurations and random weights (hidden factor 1 to 4, both activations, t to 64, down once and five times its size)
// the global error came to 1.5 to 2 times this at most: 4e-11 keeps it below 8e-11. The maximum norm, since the promise
// is made to every pair. A smaller safety factor costs steps, a larger one rejections (e^s grows along the way): 0.8
// took the fewest evaluations. The first step is what weights of a trained size accept.
constexpr double TOLERANCE = 4e-11, SAFETY = 0.8, FIRST_STEP = 0.45, MIN_FACTOR = 1.0 / 3, MAX_FACTOR = 10;

enum class Outcome { solved, not_finite, not_converged };

template <class W>
struct Dynamics {
  int pairs;   // R of the formulas
  int R, M;    // row lengths of the arrays: padded with zero weights on the host
  const W* up;      // [R, M]
  const W* down;    // [M, R]
  const W* up_t;    // [M, R] and
  const W* down_t;  // [R, M]: transposed copies where the team wants them, for the backward
  double log_rope_base, log_ntk_base;
  bool silu;

  // what v_i lacks of u_i, per i.
  CLEX_TEAM double shift(double s) const { return log_ntk_base / pairs + 2.0 * s / (pairs - 1); }
};

// What to solve for, and where to put it; count = 0 and polynomials given: the trajectory over [0, end].
struct Solution {
  const double* times;   // [count], non-decreasing
  int count;
  double end;            // s to be covered
  const double* frozen;  // nodes to replay, or null
  double* freq;          // [count, pairs]
  double* nodes;         // [MAX_STEPS + 1]
  double* states;        // [MAX_STEPS, pairs], u at the nodes, or null
  double* polynomials;   // [MAX_STEPS, 1 + DENSE_TERMS, pairs], or null
  int64_t* evaluations;  // [1]
};

// from pre-activations a to act(a) and act'(a).
template <class Team>
CLEX_TEAM void activate(const Team& team, bool silu, int M, double* hidden, double* slope) {
  if (silu) {
    team.each(M, [&](int m) CLEX_LAMBDA {
      const double a = hidden[m], g = fast_sigmoid(a);
      hidden[m] = a * g;
      slope[m] = g * (1.0 + a * (1.0 - g));
    });
  } else {
    team.each(M, [&](int m) CLEX_LAMBDA {
      const double h = fast_tanh(hidden[m]);
      hidden[m] = h;
      slope[m] = 1.0 - h * h;
    });
  }
}

// The slopes of one step and what its stages leave behind; a stride of 0 keeps the last stage only.
struct Stages {
  double* k;       // [STAGES, R]
  double* v;       // stage inputs, shifted
  double* hidden;  // activations
  double* slope;   // their derivatives
  int v_stride, m_stride;
};

// Stages first..last-1 of the step of length h from (s, u).
template <class Team, class W>
CLEX_TEAM void run_stages(const Team& team, const Dynamics<W>& dynamics, const Stages& stages, int first, int last,
                          double s, double h, const double* u) {
  const int R = dynamics.R, M = dynamics.M;
  for (int j = first; j < last; ++j) {
    const double at = s + tableau.nodes[j] * h;
    const double shift = dynamics.shift(at), growth = 0.5 * fast_exp(at);
    double* v = stages.v + j * stages.v_stride;
    double* hidden = stages.hidden + j * stages.m_stride;
    double* k = stages.k + j * R;
    team.matvec(j, R, stages.k, tableau.stage[j],
                [&](int i, double sum) CLEX_LAMBDA { v[i] = u[i] + h * sum - i * shift; });
    team.matvec(R, M, dynamics.up, v, [&](int m, double sum) CLEX_LAMBDA { hidden[m] = sum; });
    activate(team, dynamics.silu, M, hidden, stages.slope + j * stages.m_stride);
    team.matvec(M, R, dynamics.down, hidden, [&](int i, double sum) CLEX_LAMBDA { k[i] = growth * sum; });
  }
}

// The weights of F_0..F_6 in u(x) - u_0.
CLEX_TEAM void dense_basis(double x, double* basis) {
  double product = 1;
  for (int k = 0; k < DENSE_TERMS; ++k) {
    product *= k % 2 ? 1 - x : x;
    basis[k] = product;
  }
}

// s of a time, and t = 1 to exactly 0.
CLEX_TEAM double stretched(double t) { return std::log(2.0 * t - 1.0); }

// s that a trajectory must reach, with room for a logarithm elsewhere that rounds up.
inline double trajectory_end(double last) { return std::log(2 * last - 1) + 1e-9; }

constexpr int forward_doubles(int R, int M) { return (STAGES + DENSE_TERMS + 5) * R + 2 * M; }

// The adaptive loop, or the replay of frozen nodes. `memory` holds forward_doubles(R, M).
template <class Team, class W>
CLEX_TEAM Outcome integrate(const Team& team, const Dynamics<W>& dynamics, const Solution& out, double* memory) {
  const int R = dynamics.R, M = dynamics.M, pairs = dynamics.pairs;
  const Stages stages = {memory, memory + STAGES * R, memory + (STAGES + 1) * R, memory + (STAGES + 1) * R + M, 0, 0};
  double* u = stages.slope + M;
  double* next = u + R;
  double* local = next + R;   // the two error estimates, later the terms of the dense output
  double s = 0, h = FIRST_STEP;
  int steps = 0, emitted = 0, evaluations = 1, attempts = 0;
  bool rejected = false;

  const auto emit = [&](double at, double x, int terms) CLEX_LAMBDA {
    double basis[DENSE_TERMS];
    dense_basis(x, basis);
    const double scale = at / (dynamics.pairs - 1);
    double* row = out.freq + static_cast<int64_t>(emitted) * pairs;
    team.matvec(terms, R, local, basis, [&](int i, double sum) CLEX_LAMBDA {
      if (i < pairs) row[i] = fast_exp(u[i] + sum - i * scale);
    });
  };

  const double slope_at_one = dynamics.log_rope_base / pairs;
  team.each(R, [&](int i) CLEX_LAMBDA { u[i] = -i * slope_at_one; });
  for (; emitted < out.count && stretched(out.times[emitted]) <= 0; ++emitted) emit(0, 0, 0);
  run_stages(team, dynamics, stages, 0, 1, 0, 0, u);

  Outcome outcome = Outcome::solved;
  // a trajectory has a step even where its range is t = 1 alone.
  while (s < out.end || emitted < out.count || (out.polynomials && steps == 0)) {
    if (steps == MAX_STEPS || attempts++ == MAX_ATTEMPTS) {
      outcome = Outcome::not_converged;
      break;
    }
    const double target = out.frozen ? out.frozen[steps + 1] : s + h;
    if (!(target > s && target < HUGE_VAL)) {
      outcome = Outcome::not_converged;
      break;
    }
    // the backward knows the difference of the nodes alone.
    h = target - s;
    run_stages(team, dynamics, stages, 1, PROPAGATED, s, h, u);
    evaluations += PROPAGATED - 1;
    team.matvec(PROPAGATED, R, stages.k, tableau.stage[PROPAGATED],
                [&](int i, double sum) CLEX_LAMBDA { next[i] = u[i] + h * sum; });

    double factor = 1;
    if (!out.frozen) {
      double* fifth = local;
      double* third = local + R;
      team.matvec(PROPAGATED, R, stages.k, tableau.error_5,
                  [&](int i, double sum) CLEX_LAMBDA { fifth[i] = std::fabs(h * sum); });
      team.matvec(PROPAGATED, R, stages.k, tableau.error_3,
                  [&](int i, double sum) CLEX_LAMBDA { third[i] = std::fabs(h * sum); });
      const double e5 = team.max(R, fifth), e3 = team.max(R, third);
      const double norm = e5 > 0 ? e5 * (e5 / std::sqrt(e5 * e5 + 0.01 * e3 * e3)) / TOLERANCE : e5 + e3;
      if (!(norm < HUGE_VAL)) {
        outcome = Outcome::not_finite;
        break;
      }
      factor = norm > 0 ? SAFETY * std::pow(norm, -0.125) : MAX_FACTOR;
      factor = factor < MIN_FACTOR ? MIN_FACTOR : factor > MAX_FACTOR ? MAX_FACTOR : factor;
      if (norm > 1) {
        rejected = true;
        h *= factor;
        continue;
      }
      // no growth right after a rejection.
      if (rejected && factor > 1) factor = 1;
      rejected = false;
    }

    const bool dense = out.polynomials || (emitted < out.count && stretched(out.times[emitted]) <= target);
    run_stages(team, dynamics, stages, PROPAGATED, dense ? STAGES : PROPAGATED + 1, s, h, u);
    evaluations += dense ? STAGES - PROPAGATED : 1;
    if (dense) {
      for (int k = 0; k < DENSE_TERMS; ++k) {
        double* term = local + k * R;
        const double change = tableau.dense_change[k];
        team.matvec(STAGES, R, stages.k, tableau.dense[k],
                    [&](int i, double sum) CLEX_LAMBDA { term[i] = change * (next[i] - u[i]) + h * sum; });
      }
      for (; emitted < out.count && stretched(out.times[emitted]) <= target; ++emitted) {
        const double at = stretched(out.times[emitted]);
        emit(at, (at - s) / h, DENSE_TERMS);
      }
    }
    if (out.polynomials) {
      double* rows = out.polynomials + static_cast<int64_t>(steps) * (1 + DENSE_TERMS) * pairs;
      team.each(pairs, [&](int i) CLEX_LAMBDA {
        rows[i] = u[i];
        for (int k = 0; k < DENSE_TERMS; ++k) rows[(k + 1) * pairs + i] = local[k * R + i];
      });
    }
    if (out.states) {
      double* row = out.states + static_cast<int64_t>(steps) * pairs;
      team.each(pairs, [&](int i) CLEX_LAMBDA { row[i] = u[i]; });
    }
    double* first = stages.k;
    const double* last = stages.k + PROPAGATED * R;
    team.each(R, [&](int i) CLEX_LAMBDA {
      u[i] = next[i];
      first[i] = last[i];
    });
    team.each(1, [&](int) CLEX_LAMBDA { out.nodes[steps] = s; });
    s = target;
    h *= factor;
    ++steps;
  }

  // a solution that does not exist is NaN where no error can be raised.
  if (outcome != Outcome::solved) {
    team.each((out.count - emitted) * pairs,
              [&](int n) CLEX_LAMBDA { out.freq[static_cast<int64_t>(emitted) * pairs + n] = NAN; });
  }
  team.each(MAX_STEPS + 1 - steps, [&](int n) CLEX_LAMBDA { out.nodes[steps + n] = n ? HUGE_VAL : s; });
  if (out.states) {
    team.each((MAX_STEPS - steps) * pairs, [&](int n) CLEX_LAMBDA { out.states[steps * pairs + n] = 0; });
  }
  if (out.polynomials) {
    const int row = (1 + DENSE_TERMS) * pairs;
    team.each((MAX_STEPS - steps) * row, [&](int n) CLEX_LAMBDA { out.polynomials[steps * row + n] = 0; });
  }
  team.each(1, [&](int) CLEX_LAMBDA { out.evaluations[0] = evaluations; });
  return outcome;
}

// What the backward is given and where its sums go; dup and ddown are zero on entry, padded like the weights.
struct Adjoint {
  const double* times;   // [count]
  int count;
  const double* nodes;   // [MAX_STEPS + 1]
  const double* states;  // [MAX_STEPS, pairs]
  const double* freq;    // [count, pairs]
  const double* dfreq;   // [count, pairs]
  double* dup;           // [R, M]
  double* ddown;         // [M, R]
};

constexpr int backward_doubles(int R, int M) { return (4 * STAGES + DENSE_TERMS + 3) * R + 2 * STAGES * M; }

// `memory` holds backward_doubles(R, M).
template <class Team, class W>
CLEX_TEAM void differentiate(const Team& team, const Dynamics<W>& dynamics, const Adjoint& in, double* memory) {
  const int R = dynamics.R, M = dynamics.M, pairs = dynamics.pairs;
  double* k = memory;
  double* v = k + STAGES * R;
  double* q = v + STAGES * R;
  double* g = q + STAGES * R;          // gradients to the stages' inputs, then to the terms of the dense output
  double* terms = g + STAGES * R;
  double* u = terms + DENSE_TERMS * R;
  double* arriving = u + R;            // gradient to u at the end of the step
  double* leaving = arriving + R;      // gradient to u at its beginning
  double* hidden = leaving + R;
  double* slope = hidden + STAGES * M;
  const Stages stages = {k, v, hidden, slope, R, M};

  int steps = 0, remaining = in.count;
  while (steps < MAX_STEPS && in.nodes[steps + 1] < HUGE_VAL) ++steps;
  team.each(R, [&](int i) CLEX_LAMBDA { arriving[i] = 0; });

  for (int n = steps - 1; n >= 0; --n) {
    const double s = in.nodes[n], h = in.nodes[n + 1] - s;
    const double* state = in.states + static_cast<int64_t>(n) * pairs;
    team.each(R, [&](int i) CLEX_LAMBDA {
      u[i] = i < pairs ? state[i] : 0;
      leaving[i] = 0;
      for (int term = 0; term < DENSE_TERMS; ++term) terms[term * R + i] = 0;
    });
    bool dense = false;
    for (; remaining > 0 && stretched(in.times[remaining - 1]) > s; --remaining) {
      const int64_t row = static_cast<int64_t>(remaining - 1) * pairs;
      double basis[DENSE_TERMS];
      dense_basis((stretched(in.times[remaining - 1]) - s) / h, basis);
      team.each(pairs, [&](int i) CLEX_LAMBDA {
        const double dz = in.dfreq[row + i] * in.freq[row + i];
        leaving[i] += dz;
        for (int term = 0; term < DENSE_TERMS; ++term) terms[term * R + i] += basis[term] * dz;
      });
      dense = true;
    }
    // through the change of state that the terms contain.
    team.each(R, [&](int i) CLEX_LAMBDA {
      double change = 0;
      for (int term = 0; term < 3; ++term) change += tableau.dense_change[term] * terms[term * R + i];
      arriving[i] += change;
      leaving[i] -= change;
      g[PROPAGATED * R + i] = arriving[i];
      leaving[i] += arriving[i];
    });

    const int last = dense ? STAGES : PROPAGATED;
    const int rows = dense ? STAGES + DENSE_TERMS : PROPAGATED + 1;
    run_stages(team, dynamics, stages, 0, last, s, h, u);
    for (int j = last - 1; j >= 0; --j) {
      const double growth = 0.5 * h * fast_exp(s + tableau.nodes[j] * h);
      double* q_j = q + j * R;
      double* g_j = g + j * R;
      double* slope_j = slope + j * M;
      team.matvec(rows - (j + 1), R, g + (j + 1) * R, tableau.adjoint[j] + j + 1,
                  [&](int i, double sum) CLEX_LAMBDA { q_j[i] = growth * sum; });
      team.matvec_transposed(R, M, dynamics.down, dynamics.down_t, q_j,
                             [&](int m, double sum) CLEX_LAMBDA { slope_j[m] *= sum; });
      const bool end = j == PROPAGATED;
      team.matvec_transposed(M, R, dynamics.up, dynamics.up_t, slope_j, [&](int i, double sum) CLEX_LAMBDA {
        leaving[i] += sum;
        g_j[i] = end ? arriving[i] + sum : sum;
      });
    }
    team.add_outer(last, R, M, v, slope, in.dup);
    team.add_outer(last, M, R, hidden, q, in.ddown);
    double* swap = arriving;
    arriving = leaving;
    leaving = swap;
  }
}

}  // namespace clex
