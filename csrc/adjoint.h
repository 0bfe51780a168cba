// The exact adjoint of the steps that dynamics.h accepted; the derivation stands there.
#pragma once

#include "dynamics.h"

namespace clex {

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

// One step, backwards.
template <class Team, class W>
struct Differentiator {
  const Team& team;
  const Dynamics<W>& dynamics;
  const Adjoint& in;
  Stages stages;
  double* q;         // [STAGES, R], gradients to hidden @ down
  double* g;         // [STAGES, R], gradients to the stages' inputs, and right behind them
  double* terms;     // [DENSE_TERMS, R], to the terms of the dense output
  double* u;         // at the start of the step
  double* arriving;  // gradient to u at its end
  double* leaving;   // gradient to u at its start
  int remaining;     // times whose gradient has not been taken in

  CLEX_TEAM Differentiator(const Team& team, const Dynamics<W>& dynamics, const Adjoint& in, double* memory)
      : team(team), dynamics(dynamics), in(in), remaining(in.count) {
    const int R = dynamics.R, M = dynamics.M;
    stages.k = memory;
    stages.v = stages.k + STAGES * R;
    q = stages.v + STAGES * R;
    g = q + STAGES * R;
    terms = g + STAGES * R;
    u = terms + DENSE_TERMS * R;
    arriving = u + R;
    leaving = arriving + R;
    stages.hidden = leaving + R;
    stages.slope = stages.hidden + STAGES * M;
    stages.v_stride = R;
    stages.m_stride = M;
    team.each(R, [&](int i) CLEX_LAMBDA { arriving[i] = 0; });
  }

  // Gradients from the times inside the step; whether there are any.
  CLEX_TEAM bool receive(int n, double s, double h) {
    const int R = dynamics.R, pairs = dynamics.pairs, waiting = remaining;
    const double* state = in.states + static_cast<int64_t>(n) * pairs;
    team.each(R, [&](int i) CLEX_LAMBDA {
      u[i] = i < pairs ? state[i] : 0;
      leaving[i] = 0;
      for (int k = 0; k < DENSE_TERMS; ++k) terms[k * R + i] = 0;
    });
    for (; remaining > 0 && stretched(in.times[remaining - 1]) > s; --remaining) {
      const int64_t row = static_cast<int64_t>(remaining - 1) * pairs;
      double basis[DENSE_TERMS];
      dense_basis((stretched(in.times[remaining - 1]) - s) / h, basis);
      team.each(pairs, [&](int i) CLEX_LAMBDA {
        const double dz = in.dfreq[row + i] * in.freq[row + i];
        leaving[i] += dz;
        for (int k = 0; k < DENSE_TERMS; ++k) terms[k * R + i] += basis[k] * dz;
      });
    }
    // through the change of state that the terms contain.
    team.each(R, [&](int i) CLEX_LAMBDA {
      double change = 0;
      for (int k = 0; k < DENSE_TERMS; ++k) change += tableau.dense_change[k] * terms[k * R + i];
      arriving[i] += change;
      g[PROPAGATED * R + i] = arriving[i];
      leaving[i] += arriving[i] - change;
    });
    return remaining < waiting;
  }

  CLEX_TEAM void step(int n) {
    const int R = dynamics.R, M = dynamics.M;
    const double s = in.nodes[n], h = in.nodes[n + 1] - s;
    const bool dense = receive(n, s, h);
    const int last = dense ? STAGES : PROPAGATED;
    const int rows = dense ? STAGES + DENSE_TERMS : PROPAGATED + 1;
    run_stages(team, dynamics, stages, 0, last, s, h, u);
    for (int j = last - 1; j >= 0; --j) {
      const double growth = 0.5 * h * fast_exp(s + tableau.nodes[j] * h);
      double* q_j = q + j * R;
      double* g_j = g + j * R;
      double* slope_j = stages.slope + j * M;
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
    team.add_outer(last, R, M, stages.v, stages.slope, in.dup);
    team.add_outer(last, M, R, stages.hidden, q, in.ddown);
    double* swap = arriving;
    arriving = leaving;
    leaving = swap;
  }
};

// `memory` holds backward_doubles(R, M).
template <class Team, class W>
CLEX_TEAM void differentiate(const Team& team, const Dynamics<W>& dynamics, const Adjoint& in,
                             double* memory) {
  Differentiator<Team, W> differentiator(team, dynamics, in, memory);
  int steps = 0;
  while (steps < MAX_STEPS && in.nodes[steps + 1] < HUGE_VAL) ++steps;
  while (steps > 0) differentiator.step(--steps);
}

}  // namespace clex
