// exp, tanh and sigmoid in fp64 to 2.5 ulp, and exp and tanh in fp32, without branches and so vectorisable; one source
// for the host and CUDA. NaN passes through.
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

// 2^n, n the low bits of 1.5 * 2^23 + n.
CLEX_TEAM float power_of_two(float magic) {
  uint32_t bits;
  std::memcpy(&bits, &magic, 4);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
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

CLEX_TEAM float expm1_reduced(float r) {
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return r + r * r * p;
}

template <class R>
struct Reduced {
  R scale, expm1;  // e^x = scale (1 + expm1)
};

CLEX_TEAM Reduced<double> reduce_exp(double x) {
  // adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
  const double magic = x * 1.4426950408889634074 + 6755399441055744.0;
  const double n = magic - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return {power_of_two(magic), expm1_reduced(r)};
}

CLEX_TEAM Reduced<float> reduce_exp(float x) {
  const float magic = x * 1.44269504f + 12582912.0f;
  const float n = magic - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return {power_of_two(magic), expm1_reduced(r)};
}

// 0 below the normal numbers would cost a branch: the smallest of them instead.
CLEX_TEAM double fast_exp(double x) {
  x = x < -708.0 ? -708.0 : x;
  const double bounded = x > 709.0 ? 709.0 : x;
  const Reduced<double> e = reduce_exp(bounded);
  const double value = e.scale + e.scale * e.expm1;
  return x > 709.0 ? HUGE_VAL : value;
}

CLEX_TEAM float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float bounded = x > 88.0f ? 88.0f : x;
  const Reduced<float> e = reduce_exp(bounded);
  const float value = e.scale + e.scale * e.expm1;
  return x > 88.0f ? HUGE_VALF : value;
}

template <class R>
CLEX_TEAM R fast_tanh(R x) {
  const R a = x < 0 ? -x : x;
  const Reduced<R> e = reduce_exp(2 * (a > 20 ? R(20) : a));
  // e^2a - 1 without cancellation: the scale is 1 for small a, a power of two always.
  const R expm1 = e.scale * e.expm1 + (e.scale - 1);
  const R value = expm1 / (expm1 + 2);
  return x < 0 ? -value : value;
}

CLEX_TEAM double fast_sigmoid(double x) { return 1.0 / (1.0 + fast_exp(-x)); }

}  // namespace clex
