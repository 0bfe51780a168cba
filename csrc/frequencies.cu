// Frequencies on CUDA: one block runs dynamics.h. Its working memory, then the weights as stored, lie in
// shared memory where they fit, else in global memory.
#include <cstdint>

#include "adjoint.h"
#include "frequencies.h"
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace clex {

// one output needs a chain of dependent fp64 operations: many threads, so that several share an output.
constexpr int FREQUENCY_THREADS = 512;

// What lies in shared memory, in this order: the team's partial sums, the working memory, the weights.
struct SharedPlan {
  int partials;
  int memory;  // doubles
  bool memory_on_chip, weights_on_chip;
  int64_t bytes;
};

inline SharedPlan plan_shared(int R, int M, int weight_bytes, bool backward, int threads, int64_t limit) {
  SharedPlan plan{};
  plan.partials = threads;
  if (R > plan.partials) plan.partials = R;
  if (M > plan.partials) plan.partials = M;
  plan.memory = backward ? backward_doubles(R, M) : forward_doubles(R, M);
  plan.bytes = 8ll * plan.partials;
  plan.memory_on_chip = plan.bytes + 8ll * plan.memory <= limit;
  if (plan.memory_on_chip) plan.bytes += 8ll * plan.memory;
  const int64_t weights = 2ll * R * M * weight_bytes;
  plan.weights_on_chip = plan.bytes + weights <= limit;
  if (plan.weights_on_chip) plan.bytes += weights;
  return plan;
}

struct BlockTeam {
  double* partials;

  template <class F>
  CLEX_TEAM void each(int n, F f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  CLEX_TEAM double max(int n, const double* x) const {
    double largest = 0, poison = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      largest = x[i] > largest ? x[i] : largest;
      poison += 0 * x[i];
    }
    partials[threadIdx.x] = largest + poison;
    __syncthreads();
    // every thread reads all: one barrier instead of a tree of them; only the first n threads saw anything.
    const int seen = n < static_cast<int>(blockDim.x) ? n : blockDim.x;
    largest = 0;
    poison = 0;
    for (int i = 0; i < seen; ++i) {
      largest = partials[i] > largest ? partials[i] : largest;
      poison += 0 * partials[i];
    }
    __syncthreads();
    return largest + poison;
  }

  // f(n, sum_k x[k] weight(k, n)), the sum shared by as many threads as there are for each n. Skewed,
  // neighbouring threads start at neighbouring k: where k is the column of a row-major matrix they would all
  // ask one bank.
  template <bool SKEWED, class Weight, class F>
  CLEX_TEAM void reduce(int K, int N, const double* x, Weight weight, F f) const {
    const int threads = blockDim.x, shares = N < threads ? threads / N : 1;
    const int share = (K + shares - 1) / shares;
    for (int index = threadIdx.x; index < shares * N; index += threads) {
      const int n = index % N, begin = index / N * share;
      const int count = begin + share < K ? share : K - begin;
      int k = SKEWED && count > 0 ? begin + n % count : begin;
      double sum = 0;
      for (int step = 0; step < count; ++step) {
        sum += x[k] * static_cast<double>(weight(k, n));
        ++k;
        if (SKEWED && k == begin + count) k = begin;
      }
      partials[index] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < N; n += threads) {
      double sum = 0;
      for (int p = 0; p < shares; ++p) sum += partials[p * N + n];
      f(n, sum);
    }
    __syncthreads();
  }

  // f(n, sum_k x[k] w[k, n])
  template <class W, class F>
  CLEX_TEAM void matvec(int K, int N, const W* w, const double* x, F f) const {
    reduce<false>(K, N, x, [&](int k, int n) CLEX_LAMBDA { return w[k * N + n]; }, f);
  }

  // f(n, sum_k x[k] w[n, k])
  template <class W, class F>
  CLEX_TEAM void matvec_transposed(int K, int N, const W* w, const W*, const double* x, F f) const {
    reduce<true>(K, N, x, [&](int k, int n) CLEX_LAMBDA { return w[n * K + k]; }, f);
  }

  // c[i, j] += sum_e a[e, i] b[e, j]
  CLEX_TEAM void add_outer(int E, int rows, int columns, const double* a, const double* b, double* c) const {
    for (int index = threadIdx.x; index < rows * columns; index += blockDim.x) {
      const int i = index / columns, j = index % columns;
      double sum = 0;
      for (int e = 0; e < E; ++e) sum += a[e * rows + i] * b[e * columns + j];
      c[index] += sum;
    }
    __syncthreads();
  }
};

// Copies the weights to shared memory if they have a place there; the working memory, which may have one too.
template <class W>
CLEX_TEAM double* move_on_chip(const BlockTeam& team, const SharedPlan& plan, double* shared,
                               Dynamics<W>& dynamics, double* memory) {
  double* place = shared + plan.partials;
  if (plan.memory_on_chip) {
    memory = place;
    place += plan.memory;
  }
  if (plan.weights_on_chip) {
    const int count = dynamics.R * dynamics.M;
    W* up = reinterpret_cast<W*>(place);
    W* down = up + count;
    team.each(count, [&](int i) CLEX_LAMBDA {
      up[i] = dynamics.up[i];
      down[i] = dynamics.down[i];
    });
    dynamics.up = up;
    dynamics.down = down;
  }
  return memory;
}

// `memory` is global memory of plan.memory doubles, used where shared memory has no room.
template <class W>
__global__ void __launch_bounds__(FREQUENCY_THREADS, 1)
    solve_frequencies_kernel(Dynamics<W> dynamics, Solution out, SharedPlan plan, double* memory) {
  extern __shared__ double shared[];
  const BlockTeam team{shared};
  memory = move_on_chip(team, plan, shared, dynamics, memory);
  integrate(team, dynamics, out, memory);
}

template <class W>
__global__ void __launch_bounds__(FREQUENCY_THREADS, 1)
    solve_frequencies_bwd_kernel(Dynamics<W> dynamics, Adjoint in, SharedPlan plan, double* memory) {
  extern __shared__ double shared[];
  const BlockTeam team{shared};
  memory = move_on_chip(team, plan, shared, dynamics, memory);
  differentiate(team, dynamics, in, memory);
}

#if defined(__CUDACC__)
namespace {

template <class W>
Dynamics<W> unpadded(const FrequencySizes& sizes, const W* up, const W* down) {
  return {sizes.pairs, sizes.pairs, sizes.hidden, up, down, nullptr, nullptr, sizes.log_rope_base,
          sizes.log_ntk_base, sizes.silu};
}

template <class W, class Task>
const char* launch(void (*kernel)(Dynamics<W>, Task, SharedPlan, double*), const Dynamics<W>& dynamics,
                   const Task& task, bool backward, double* memory, void* stream) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  // the same for all sizes: between here and the launch another thread may launch the kernel with others.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  if (error == cudaSuccess) {
    const auto plan = plan_shared(dynamics.R, dynamics.M, sizeof(W), backward, FREQUENCY_THREADS, limit);
    const auto on = static_cast<cudaStream_t>(stream);
    kernel<<<1, FREQUENCY_THREADS, plan.bytes, on>>>(dynamics, task, plan, memory);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t memory_doubles(const FrequencySizes& sizes) { return backward_doubles(sizes.pairs, sizes.hidden); }

template <class W>
const char* solve_frequencies_cuda(const FrequencySizes& sizes, const W* up, const W* down,
                                   const double* times, const double* frozen, double* freq, double* nodes,
                                   double* states, int64_t* evaluations, double* memory, void* stream) {
  const Solution out = {times, sizes.count, 0, frozen, freq, nodes, states, nullptr, evaluations};
  return launch(solve_frequencies_kernel<W>, unpadded(sizes, up, down), out, false, memory, stream);
}

template <class W>
const char* trajectory_cuda(const FrequencySizes& sizes, const W* up, const W* down, double last,
                            double* nodes, double* polynomials, int64_t* evaluations, double* memory,
                            void* stream) {
  const Solution out = {nullptr, 0, trajectory_end(last), nullptr, nullptr, nodes, nullptr, polynomials,
                        evaluations};
  return launch(solve_frequencies_kernel<W>, unpadded(sizes, up, down), out, false, memory, stream);
}

template <class W>
const char* solve_frequencies_bwd_cuda(const FrequencySizes& sizes, const W* up, const W* down,
                                       const double* times, const double* nodes, const double* states,
                                       const double* freq, const double* dfreq, double* dup, double* ddown,
                                       double* memory, void* stream) {
  const Adjoint in = {times, sizes.count, nodes, states, freq, dfreq, dup, ddown};
  return launch(solve_frequencies_bwd_kernel<W>, unpadded(sizes, up, down), in, true, memory, stream);
}

template const char* solve_frequencies_cuda(const FrequencySizes&, const float*, const float*, const double*,
                                            const double*, double*, double*, double*, int64_t*, double*,
                                            void*);
template const char* trajectory_cuda(const FrequencySizes&, const float*, const float*, double, double*,
                                     double*, int64_t*, double*, void*);
template const char* solve_frequencies_bwd_cuda(const FrequencySizes&, const float*, const float*,
                                                const double*, const double*, const double*, const double*,
                                                const double*, double*, double*, double*, void*);
template const char* solve_frequencies_cuda(const FrequencySizes&, const double*, const double*,
                                            const double*, const double*, double*, double*, double*, int64_t*,
                                            double*, void*);
template const char* trajectory_cuda(const FrequencySizes&, const double*, const double*, double, double*,
                                     double*, int64_t*, double*, void*);
template const char* solve_frequencies_bwd_cuda(const FrequencySizes&, const double*, const double*,
                                                const double*, const double*, const double*, const double*,
                                                const double*, double*, double*, double*, void*);
#endif

}  // namespace clex
