// Frequencies on the CPU: packing, the vectorised team, and the instruction sets around dynamics.h.
#pragma once

#include <cstdint>

namespace clex {

enum class Solved { yes, bad_weights, bad_times, not_converged };

struct FrequencySizes {
  int pairs, hidden, count;
  double log_rope_base, log_ntk_base;
  bool silu;
};

// most steps that a solution may take, and rows per step of its polynomials: u at the step's start and 7
// terms.
int trajectory_steps();
int trajectory_terms();

// freq [count, pairs], nodes [steps + 1], states [steps, pairs]; frozen nodes are replayed unless null.
template <class W>
Solved solve_frequencies_cpu(const FrequencySizes& sizes, const W* up, const W* down, const double* times,
                             const double* frozen, double* freq, double* nodes, double* states,
                             int64_t* evaluations);

// nodes [steps + 1], polynomials [steps, 8, pairs], from t = 1 past t = last.
template <class W>
Solved trajectory_cpu(const FrequencySizes& sizes, const W* up, const W* down, double last, double* nodes,
                      double* polynomials);

// dup [pairs, hidden], ddown [hidden, pairs].
template <class W>
void solve_frequencies_bwd_cpu(const FrequencySizes& sizes, const W* up, const W* down, const double* times,
                               const double* nodes, const double* states, const double* freq,
                               const double* dfreq, W* dup, W* ddown);

// The same on CUDA, asynchronously; a solution that does not exist is NaN. Weights in row-major order,
// `memory` of memory_doubles, sums dup and ddown in fp64 and zero on entry. The result is null or an error of
// the CUDA runtime.
int64_t memory_doubles(const FrequencySizes& sizes);

template <class W>
const char* solve_frequencies_cuda(const FrequencySizes& sizes, const W* up, const W* down,
                                   const double* times, const double* frozen, double* freq, double* nodes,
                                   double* states, int64_t* evaluations, double* memory, void* stream);

template <class W>
const char* trajectory_cuda(const FrequencySizes& sizes, const W* up, const W* down, double last,
                            double* nodes, double* polynomials, int64_t* evaluations, double* memory,
                            void* stream);

template <class W>
const char* solve_frequencies_bwd_cuda(const FrequencySizes& sizes, const W* up, const W* down,
                                       const double* times, const double* nodes, const double* states,
                                       const double* freq, const double* dfreq, double* dup, double* ddown,
                                       double* memory, void* stream);

}  // namespace clex
