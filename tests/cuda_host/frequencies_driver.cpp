// csrc/frequencies.cu on the host: a library for ctypes, and a program for ThreadSanitizer.
#include "cuda_host.h"

#include "frequencies.cu"

#include <cmath>
#include <cstdio>

namespace clex {
alignas(64) double shared[1 << 16];
}

namespace {

// `limit` bytes of shared memory, so that every placement can be tried. False where the threads parted at a
// barrier.
template <class W, class Task>
bool run(void (*kernel)(clex::Dynamics<W>, Task, clex::SharedPlan, double*),
         const clex::Dynamics<W>& dynamics, const Task& task, bool backward, int threads, int64_t limit) {
  if (limit > static_cast<int64_t>(sizeof(clex::shared))) limit = sizeof(clex::shared);
  const auto plan = clex::plan_shared(dynamics.R, dynamics.M, sizeof(W), backward, threads, limit);
  for (double& value : clex::shared) value = NAN;
  std::vector<double> memory(plan.memory, NAN);
  return cuda_host::launch(1, threads, [&] { kernel(dynamics, task, plan, memory.data()); });
}

}  // namespace

extern "C" bool solve_frequencies(int pairs, int hidden, int count, double log_rope_base, double log_ntk_base,
                                  int silu, const float* up, const float* down, const double* times,
                                  double last, double* freq, double* nodes, double* states,
                                  double* polynomials, int64_t* evaluations, int threads, int64_t limit) {
  const clex::Dynamics<float> dynamics = {pairs,   pairs,   hidden,        up,           down,
                                          nullptr, nullptr, log_rope_base, log_ntk_base, silu != 0};
  const double end = last > 1 ? clex::trajectory_end(last) : 0;
  const clex::Solution out = {times, count, end, nullptr, freq, nodes, states, polynomials, evaluations};
  return run(clex::solve_frequencies_kernel<float>, dynamics, out, false, threads, limit);
}

extern "C" bool solve_frequencies_bwd(int pairs, int hidden, int count, double log_ntk_base, int silu,
                                      const float* up, const float* down, const double* times,
                                      const double* nodes, const double* states, const double* freq,
                                      const double* dfreq, double* dup, double* ddown, int threads,
                                      int64_t limit) {
  const clex::Dynamics<float> dynamics = {pairs,   pairs,   hidden, up,           down,
                                          nullptr, nullptr, 0,      log_ntk_base, silu != 0};
  const clex::Adjoint in = {times, count, nodes, states, freq, dfreq, dup, ddown};
  return run(clex::solve_frequencies_bwd_kernel<float>, dynamics, in, true, threads, limit);
}

int main() {
  constexpr int R = 3, M = 5, T = 2, THREADS = 8;
  std::vector<float> up(R * M), down(M * R);
  for (int i = 0; i < R * M; ++i) {
    up[i] = std::sin(1.f + i);
    down[i] = 0.1f * std::cos(2.f + i);
  }
  const double times[T] = {1.5, 3};
  std::vector<double> freq(T * R), dfreq(T * R, 1), nodes(clex::MAX_STEPS + 1), states(clex::MAX_STEPS * R);
  std::vector<double> dup(R * M), ddown(M * R);
  int64_t evaluations = 0;
  for (const int64_t limit : {int64_t(0), int64_t(1) << 20}) {
    solve_frequencies(R, M, T, std::log(1e4), std::log(1e4), 1, up.data(), down.data(), times, 1, freq.data(),
                      nodes.data(), states.data(), nullptr, &evaluations, THREADS, limit);
    solve_frequencies_bwd(R, M, T, std::log(1e4), 1, up.data(), down.data(), times, nodes.data(),
                          states.data(), freq.data(), dfreq.data(), dup.data(), ddown.data(), THREADS, limit);
  }
  std::printf("%lld evaluations\n", static_cast<long long>(evaluations));
}
