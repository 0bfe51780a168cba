// csrc/tables.cu on the host: a library for ctypes, and a program for ThreadSanitizer.
#include <cmath>

#include "cuda_host.h"
#include "tables.cu"

extern "C" bool fill_table(const double* freq, const double* positions, int64_t factors, int64_t rows,
                           int64_t pairs, double spacing, double amplitude, double* out, int blocks,
                           int threads) {
  const clex::TableSpec spec = {freq, positions, factors, rows, pairs, rows, spacing, amplitude};
  return cuda_host::launch(blocks, threads, [&] { clex::fill_table_kernel<double>(spec, out); });
}

int main() {
  constexpr int T = 2, ROWS = 3, R = 5;
  std::vector<double> freq(T * R, 0.5), out(T * ROWS * 2 * R);
  return fill_table(freq.data(), nullptr, T, ROWS, R, 64, 1, out.data(), 2, 8) ? 0 : 1;
}
