// The frequency ODE of CLEX and its adaptive solution, one source for the host and for a CUDA block; no
// torch.
//
// R rotary pairs, M hidden units, s = ln(2t - 1), u_i = z_i + (i / (R-1)) s where z_i = ln freq_i:
//
//     du/ds = (e^s / 2) act(v @ up) @ down,  v_i = u_i - i (ln n / R + 2 s / (R-1)),  u_i(0) = -(i / R) ln b
//
// n is the NTK base, b the rotary base. The NTK part of dz/dt is an exact derivative and has left the
// equation, so only the MLP is integrated. DOP853 takes the steps; each step is continued between its ends by
//
//     u(x) = u_0 + x (F_0 + (1-x) (F_1 + x (F_2 + (1-x) (F_3 + x (F_4 + (1-x) (F_5 + x F_6)))))),
//
// F_k = dense_change[k] (u_1 - u_0) + h sum_l dense[k][l] k_l. The times asked are read from that alone, so
// the steps, and with them the frequencies at a time, do not depend on which other times are asked.
//
// Backward is the adjoint of these operations, the step lengths held constant: with g_j the gradient to the
// input of stage j and G_k that to F_k,
//
//     dk_j = h (sum_{l>j} stage[l][j] g_l + sum_k dense[k][j] G_k),    g_j = J_j^T dk_j,
//
// where g_12 also holds what arrives at the end of the step. Nothing is stored but u at the step boundaries.
//
// A Team runs the loops: one thread with vector instructions, or a CUDA block. Each of its functions returns
// with the results visible to the whole team.
#pragma once

#include <cmath>
#include <cstdint>

#include "dop853.h"
#include "fast_math.h"

namespace clex {

constexpr int MAX_STEPS = 128;
constexpr int MAX_ATTEMPTS = 4 * MAX_STEPS;

// The largest local error allowed in any u_i, that is, in the relative error of any frequency. Over the
// released configurations and random weights (hidden factor 1 to 4, both activations, t to 64, down once and
// five times its size) the global error came to 1.5 to 2 times this at most: 4e-11 keeps it below 8e-11. The
// maximum norm, since the promise is made to every pair. A smaller safety factor costs steps, a larger one
// rejections (e^s grows along the way): 0.8 took the fewest evaluations. The first step is what weights of a
// trained size accept.
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
CLEX_TEAM void run_stages(const Team& team, const Dynamics<W>& dynamics, const Stages& stages, int first,
                          int last, double s, double h, const double* u) {
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

// The adaptive loop, or the replay of frozen nodes. All members but the arrays are the same in every thread.
template <class Team, class W>
struct Integrator {
  const Team& team;
  const Dynamics<W>& dynamics;
  const Solution& out;
  Stages stages;
  double* u;      // at the start of the step
  double* next;   // at its end
  double* local;  // the two error estimates, later the terms of the dense output
  double s = 0, h = FIRST_STEP;
  int steps = 0, emitted = 0, evaluations = 0;
  bool rejected = false;

  CLEX_TEAM Integrator(const Team& team, const Dynamics<W>& dynamics, const Solution& out, double* memory)
      : team(team), dynamics(dynamics), out(out) {
    const int R = dynamics.R, M = dynamics.M;
    stages.k = memory;
    stages.v = stages.k + STAGES * R;
    stages.hidden = stages.v + R;
    stages.slope = stages.hidden + M;
    stages.v_stride = stages.m_stride = 0;
    u = stages.slope + M;
    next = u + R;
    local = next + R;
  }

  CLEX_TEAM void evaluate(int first, int last, double length) {
    run_stages(team, dynamics, stages, first, last, s, length, u);
    evaluations += last - first;
  }

  CLEX_TEAM bool time_within(double end) const {
    return emitted < out.count && stretched(out.times[emitted]) <= end;
  }

  // The next time asked, read off the step it lies in. NaN before that step (a time below 1 or out of order):
  // on CUDA nobody has looked at the times.
  CLEX_TEAM void emit(int terms) {
    const double at = stretched(out.times[emitted]), x = (at - s) / h;
    double basis[DENSE_TERMS];
    dense_basis(x, basis);
    const int pairs = dynamics.pairs;
    const double scale = at / (pairs - 1);
    double* row = out.freq + static_cast<int64_t>(emitted++) * pairs;
    team.matvec(terms, dynamics.R, local, basis, [&](int i, double sum) CLEX_LAMBDA {
      if (i < pairs) row[i] = x < 0 ? NAN : fast_exp(u[i] + sum - i * scale);
    });
  }

  CLEX_TEAM void begin() {
    const double step = dynamics.log_rope_base / dynamics.pairs;
    team.each(dynamics.R, [&](int i) CLEX_LAMBDA { u[i] = -i * step; });
    while (time_within(0)) emit(0);
    evaluate(0, 1, 0);
  }

  CLEX_TEAM double error_norm() {
    double* fifth = local;
    double* third = local + dynamics.R;
    team.matvec(PROPAGATED, dynamics.R, stages.k, tableau.error_5,
                [&](int i, double sum) CLEX_LAMBDA { fifth[i] = std::fabs(h * sum); });
    team.matvec(PROPAGATED, dynamics.R, stages.k, tableau.error_3,
                [&](int i, double sum) CLEX_LAMBDA { third[i] = std::fabs(h * sum); });
    const double e5 = team.max(dynamics.R, fifth), e3 = team.max(dynamics.R, third);
    return e5 > 0 ? e5 * (e5 / std::sqrt(e5 * e5 + 0.01 * e3 * e3)) / TOLERANCE : e5 + e3;
  }

  // From the end of an attempt: whether it stands, and by what the next one's length differs.
  CLEX_TEAM bool accept(double norm, double& factor) {
    factor = norm > 0 ? SAFETY * std::pow(norm, -0.125) : MAX_FACTOR;
    factor = factor < MIN_FACTOR ? MIN_FACTOR : factor > MAX_FACTOR ? MAX_FACTOR : factor;
    // no growth right after a rejection.
    if (rejected && factor > 1) factor = 1;
    rejected = norm > 1;
    return !rejected;
  }

  CLEX_TEAM void build_dense() {
    for (int k = 0; k < DENSE_TERMS; ++k) {
      double* term = local + k * dynamics.R;
      const double change = tableau.dense_change[k];
      team.matvec(STAGES, dynamics.R, stages.k, tableau.dense[k],
                  [&](int i, double sum) CLEX_LAMBDA { term[i] = change * (next[i] - u[i]) + h * sum; });
    }
  }

  CLEX_TEAM void record() {
    const int pairs = dynamics.pairs, R = dynamics.R;
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
    team.each(1, [&](int) CLEX_LAMBDA { out.nodes[steps] = s; });
  }

  // The step to `target` stands: reads the times off it and moves on.
  CLEX_TEAM void advance(double target) {
    const bool dense = out.polynomials || time_within(target);
    evaluate(PROPAGATED, dense ? STAGES : PROPAGATED + 1, h);
    if (dense) build_dense();
    while (time_within(target)) emit(DENSE_TERMS);
    record();
    double* first = stages.k;
    const double* last = stages.k + PROPAGATED * dynamics.R;
    team.each(dynamics.R, [&](int i) CLEX_LAMBDA {
      u[i] = next[i];
      first[i] = last[i];
    });
    s = target;
    ++steps;
  }

  // A trajectory has a step even where its range is t = 1 alone.
  CLEX_TEAM bool done() const {
    return s >= out.end && emitted == out.count && !(out.polynomials && steps == 0);
  }

  CLEX_TEAM Outcome loop() {
    for (int attempts = 0; !done(); ++attempts) {
      if (steps == MAX_STEPS || attempts == MAX_ATTEMPTS) return Outcome::not_converged;
      const double target = out.frozen ? out.frozen[steps + 1] : s + h;
      if (!(target > s && target < HUGE_VAL)) return Outcome::not_converged;
      // the backward knows the difference of the nodes alone.
      h = target - s;
      evaluate(1, PROPAGATED, h);
      team.matvec(PROPAGATED, dynamics.R, stages.k, tableau.stage[PROPAGATED],
                  [&](int i, double sum) CLEX_LAMBDA { next[i] = u[i] + h * sum; });
      double factor = 1;
      bool accepted = true;
      if (!out.frozen) {
        const double norm = error_norm();
        if (!(norm < HUGE_VAL)) return Outcome::not_finite;
        accepted = accept(norm, factor);
      }
      if (accepted) advance(target);
      h *= factor;
    }
    return Outcome::solved;
  }

  // Fills what the steps left; a solution that does not exist is NaN where no error can be raised.
  CLEX_TEAM void finish() {
    const int pairs = dynamics.pairs, row = (1 + DENSE_TERMS) * pairs;
    const int64_t done = static_cast<int64_t>(emitted) * pairs;
    team.each((out.count - emitted) * pairs, [&](int n) CLEX_LAMBDA { out.freq[done + n] = NAN; });
    team.each(MAX_STEPS + 1 - steps, [&](int n) CLEX_LAMBDA { out.nodes[steps + n] = n ? HUGE_VAL : s; });
    if (out.states) {
      team.each((MAX_STEPS - steps) * pairs, [&](int n) CLEX_LAMBDA { out.states[steps * pairs + n] = 0; });
    }
    if (out.polynomials) {
      team.each((MAX_STEPS - steps) * row, [&](int n) CLEX_LAMBDA { out.polynomials[steps * row + n] = 0; });
    }
    team.each(1, [&](int) CLEX_LAMBDA { out.evaluations[0] = evaluations; });
  }
};

// `memory` holds forward_doubles(R, M).
template <class Team, class W>
CLEX_TEAM Outcome integrate(const Team& team, const Dynamics<W>& dynamics, const Solution& out,
                            double* memory) {
  Integrator<Team, W> integrator(team, dynamics, out, memory);
  integrator.begin();
  const Outcome outcome = integrator.loop();
  integrator.finish();
  return outcome;
}

}  // namespace clex
