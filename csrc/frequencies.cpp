#include "frequencies.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "adjoint.h"
#include "isa.h"

namespace clex {

namespace {

// every row is padded to a multiple of the widest vector.
constexpr int PADDING = 8;

// LANES is the width of the instruction set: gcc lowers wider vectors to memory operations.
template <int LANES>
struct Vector {
  typedef double Wide __attribute__((vector_size(8 * LANES), aligned(8)));
};

// One thread with vectors. Weights are in fp64: converting them on load takes longer than the bytes saved.
template <int LANES>
struct HostTeam {
  using Wide = typename Vector<LANES>::Wide;

  static CLEX_TEAM const Wide& load(const double* from) { return *reinterpret_cast<const Wide*>(from); }
  static CLEX_TEAM void store(const Wide& from, double* to) { *reinterpret_cast<Wide*>(to) = from; }

  template <class F>
  CLEX_TEAM void each(int n, F f) const {
#pragma omp simd
    for (int i = 0; i < n; ++i) f(i);
  }

  CLEX_TEAM double max(int n, const double* x) const {
    double largest = 0, poison = 0;
    // comparisons lose NaN and 0 times NaN does not.
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int i = 0; i < n; ++i) {
      largest = x[i] > largest ? x[i] : largest;
      poison += 0 * x[i];
    }
    return largest + poison;
  }

  // f(n, sum_k x[k] w[k, n]) for a block of columns whose sums stay in registers: nothing is reduced.
  template <int VECTORS, class F>
  CLEX_TEAM void columns(int K, int N, int n, const double* w, const double* x, F f) const {
    Wide sums[VECTORS] = {};
    for (int k = 0; k < K; ++k) {
      const double* row = w + static_cast<int64_t>(k) * N + n;
#pragma GCC unroll 16
      for (int b = 0; b < VECTORS; ++b) sums[b] += x[k] * load(row + b * LANES);
    }
    alignas(64) double stored[VECTORS * LANES];
#pragma GCC unroll 16
    for (int b = 0; b < VECTORS; ++b) store(sums[b], stored + b * LANES);
#pragma omp simd
    for (int b = 0; b < VECTORS * LANES; ++b) f(n + b, stored[b]);
  }

  template <class F>
  CLEX_TEAM void matvec(int K, int N, const double* w, const double* x, F f) const {
    int n = 0;
    // AVX-512 has the registers to read whole rows of 128, which the prefetcher likes better than half rows.
    if constexpr (LANES == 8) {
      for (; n + 16 * LANES <= N; n += 16 * LANES) columns<16>(K, N, n, w, x, f);
    }
    for (; n + 8 * LANES <= N; n += 8 * LANES) columns<8>(K, N, n, w, x, f);
    for (; n < N; n += LANES) columns<1>(K, N, n, w, x, f);
  }

  // f(n, sum_k x[k] w[n, k]), from the transposed copy.
  template <class F>
  CLEX_TEAM void matvec_transposed(int K, int N, const double*, const double* w_t, const double* x,
                                   F f) const {
    matvec(K, N, w_t, x, f);
  }

  // c[i, j] += sum_e a[e, i] b[e, j]
  CLEX_TEAM void add_outer(int E, int rows, int columns, const double* a, const double* b, double* c) const {
    constexpr int TALL = 8;
    for (int i = 0; i < rows; i += TALL) {
      for (int j = 0; j < columns; j += LANES) {
        Wide sums[TALL];
#pragma GCC unroll 8
        for (int p = 0; p < TALL; ++p) sums[p] = load(c + (i + p) * columns + j);
        for (int e = 0; e < E; ++e) {
          const Wide& value = load(b + e * columns + j);
#pragma GCC unroll 8
          for (int p = 0; p < TALL; ++p) sums[p] += a[e * rows + i + p] * value;
        }
#pragma GCC unroll 8
        for (int p = 0; p < TALL; ++p) store(sums[p], c + (i + p) * columns + j);
      }
    }
  }
};

struct Forward {
  const Dynamics<double>& dynamics;
  const Solution& out;
  double* memory;
  Outcome outcome;

  template <class Team>
  CLEX_TEAM void operator()(const Team& team) {
    outcome = integrate(team, dynamics, out, memory);
  }
};

struct Backward {
  const Dynamics<double>& dynamics;
  const Adjoint& in;
  double* memory;

  template <class Team>
  CLEX_TEAM void operator()(const Team& team) {
    differentiate(team, dynamics, in, memory);
  }
};

template <class Job>
CLEX_AVX512 void run_avx512(Job& job) {
  job(HostTeam<8>());
}
template <class Job>
CLEX_AVX2 void run_avx2(Job& job) {
  job(HostTeam<4>());
}
template <class Job>
void run_baseline(Job& job) {
  job(HostTeam<2>());
}

template <class Job>
void run(Job& job) {
  switch (active_isa()) {
    case Isa::avx512_bf16:
    case Isa::avx512: return run_avx512(job);
    case Isa::avx2: return run_avx2(job);
    case Isa::baseline: return run_baseline(job);
  }
}

int padded(int n) { return (n + PADDING - 1) / PADDING * PADDING; }

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// [rows, columns] to rows of `to_columns`, zero past the columns.
template <class A, class B>
void copy_rows(const A* from, int rows, int columns, int from_columns, B* to, int to_columns) {
  for (int i = 0; i < rows; ++i, from += from_columns, to += to_columns) {
    std::copy_n(from, columns, to);
    std::fill_n(to + columns, to_columns - columns, B(0));
  }
}

void transpose(const double* from, int rows, int columns, double* to) {
  // by blocks that stay in the first-level cache; rows are a multiple of PADDING.
  for (int i = 0; i < rows; i += PADDING) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int p = 0; p < PADDING; ++p) to[j * rows + i + p] = from[(i + p) * columns + j];
    }
  }
}

// Weights as dynamics.h wants them on the host: padded, in fp64, and transposed as well for the backward.
struct Packed {
  Dynamics<double> dynamics;
  std::unique_ptr<double[]> storage;

  template <class W>
  Packed(const FrequencySizes& sizes, const W* given_up, const W* given_down, bool backward) {
    const int R = padded(sizes.pairs), M = padded(sizes.hidden);
    const int64_t count = static_cast<int64_t>(R) * M;
    storage = uninitialised<double>(backward ? 4 * count : 2 * count);
    double* up = storage.get();
    double* down = up + count;
    double* up_t = backward ? down + count : nullptr;
    double* down_t = backward ? up_t + count : nullptr;
    copy_rows(given_up, sizes.pairs, sizes.hidden, sizes.hidden, up, M);
    std::fill(up + static_cast<int64_t>(sizes.pairs) * M, up + count, 0.0);
    copy_rows(given_down, sizes.hidden, sizes.pairs, sizes.pairs, down, R);
    std::fill(down + static_cast<int64_t>(sizes.hidden) * R, down + count, 0.0);
    if (backward) {
      transpose(up, R, M, up_t);
      transpose(down, M, R, down_t);
    }
    dynamics = {sizes.pairs, R, M, up, down, up_t, down_t, sizes.log_rope_base, sizes.log_ntk_base,
                sizes.silu};
  }
};

template <class W>
bool all_finite(const W* values, int64_t count) {
  // 0 times NaN or infinity is NaN, and sums of zeros are zeros.
  W sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
#pragma omp simd
    for (int b = 0; b < 16; ++b) sums[b] += W(0) * values[i + b];
  }
  for (; i < count; ++i) sums[0] += W(0) * values[i];
  W sum = 0;
  for (const W partial : sums) sum += partial;
  return sum == 0;
}

bool valid_times(const double* times, int count) {
  double previous = 1;
  for (int i = 0; i < count; ++i) {
    if (!(times[i] >= previous && std::isfinite(times[i]))) return false;
    previous = times[i];
  }
  return true;
}

template <class W>
Solved solve(const FrequencySizes& sizes, const W* up, const W* down, const Solution& out) {
  const int64_t weights = static_cast<int64_t>(sizes.pairs) * sizes.hidden;
  if (!all_finite(up, weights) || !all_finite(down, weights)) return Solved::bad_weights;
  if (!valid_times(out.times, out.count)) return Solved::bad_times;
  const Packed packed(sizes, up, down, false);
  const auto memory = uninitialised<double>(forward_doubles(packed.dynamics.R, packed.dynamics.M));
  Forward forward{packed.dynamics, out, memory.get(), Outcome::solved};
  run(forward);
  return forward.outcome == Outcome::solved ? Solved::yes : Solved::not_converged;
}

}  // namespace

int trajectory_steps() { return MAX_STEPS; }
int trajectory_terms() { return 1 + DENSE_TERMS; }

template <class W>
Solved solve_frequencies_cpu(const FrequencySizes& sizes, const W* up, const W* down, const double* times,
                             const double* frozen, double* freq, double* nodes, double* states,
                             int64_t* evaluations) {
  return solve(sizes, up, down,
               {times, sizes.count, 0, frozen, freq, nodes, states, nullptr, evaluations});
}

template <class W>
Solved trajectory_cpu(const FrequencySizes& sizes, const W* up, const W* down, double last, double* nodes,
                      double* polynomials) {
  int64_t evaluations;
  return solve(sizes, up, down, {nullptr, 0, trajectory_end(last), nullptr, nullptr, nodes, nullptr,
               polynomials, &evaluations});
}

template <class W>
void solve_frequencies_bwd_cpu(const FrequencySizes& sizes, const W* up, const W* down, const double* times,
                               const double* nodes, const double* states, const double* freq,
                               const double* dfreq, W* dup, W* ddown) {
  const Packed packed(sizes, up, down, true);
  const int R = packed.dynamics.R, M = packed.dynamics.M;
  const int64_t weights = static_cast<int64_t>(R) * M;
  const auto sums = uninitialised<double>(2 * weights);
  std::fill_n(sums.get(), 2 * weights, 0.0);
  const auto memory = uninitialised<double>(backward_doubles(R, M));
  const Adjoint in = {times, sizes.count, nodes, states, freq, dfreq, sums.get(), sums.get() + weights};
  Backward backward{packed.dynamics, in, memory.get()};
  run(backward);
  copy_rows(in.dup, sizes.pairs, sizes.hidden, M, dup, sizes.hidden);
  copy_rows(in.ddown, sizes.hidden, sizes.pairs, R, ddown, sizes.pairs);
}

template Solved solve_frequencies_cpu(const FrequencySizes&, const float*, const float*, const double*,
                                      const double*, double*, double*, double*, int64_t*);
template Solved solve_frequencies_cpu(const FrequencySizes&, const double*, const double*, const double*,
                                      const double*, double*, double*, double*, int64_t*);
template Solved trajectory_cpu(const FrequencySizes&, const float*, const float*, double, double*, double*);
template Solved trajectory_cpu(const FrequencySizes&, const double*, const double*, double, double*, double*);
template void solve_frequencies_bwd_cpu(const FrequencySizes&, const float*, const float*, const double*,
                                        const double*, const double*, const double*, const double*, float*,
                                        float*);
template void solve_frequencies_bwd_cpu(const FrequencySizes&, const double*, const double*, const double*,
                                        const double*, const double*, const double*, const double*, double*,
                                        double*);

}  // namespace clex
