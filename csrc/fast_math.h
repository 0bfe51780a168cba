// exp, tanh and sigmoid in fp64 to 2.5 ulp, without branches and so vectorisable; one source for the host and
// CUDA. NaN passes through.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CLEX_TEAM __device__ __forceinline__
#define CLEX_LAMBDA
#else
// a helper that is not inlined would keep the baseline instruction set of its own.
#define CLEX_TEAM inline __attribute__((always_inline))
#define CLEX_LAMBDA __attribute__((always_inline))
#endif

namespace clex {

// 2^n, n the low bits of 1.5 * 2^52 + n.
CLEX_TEAM double power_of_two(double magic) {
  int64_t bits;
  std::memcpy(&bits, &magic, 8);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits + 1023) << 52);
  double power;
  std::memcpy(&power, &bits, 8);
  return power;
}

// e^r - 1 for |r| <= ln(2) / 2 by its Taylor series.
CLEX_TEAM double expm1_reduced(double r) {
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  return r + r * r * p;
}

struct Reduced {
  double scale, expm1;  // e^x = scale (1 + expm1)
};

CLEX_TEAM Reduced reduce_exp(double x) {
  // adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
  const double magic = x * 1.4426950408889634074 + 6755399441055744.0;
  const double n = magic - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return {power_of_two(magic), expm1_reduced(r)};
}

// 0 below the normal numbers would cost a branch: the smallest of them instead.
CLEX_TEAM double fast_exp(double x) {
  x = x < -708.0 ? -708.0 : x;
  const double bounded = x > 709.0 ? 709.0 : x;
  const Reduced e = reduce_exp(bounded);
  const double value = e.scale + e.scale * e.expm1;
  return x > 709.0 ? HUGE_VAL : value;
}

CLEX_TEAM double fast_tanh(double x) {
  const double a = x < 0 ? -x : x;
  const Reduced e = reduce_exp(2.0 * (a > 20.0 ? 20.0 : a));
  // e^2a - 1 without cancellation: the scale is 1 for small a, a power of two always.
  const double expm1 = e.scale * e.expm1 + (e.scale - 1.0);
  const double value = expm1 / (expm1 + 2.0);
  return x < 0 ? -value : value;
}

CLEX_TEAM double fast_sigmoid(double x) { return 1.0 / (1.0 + fast_exp(-x)); }

}  // namespace clex
