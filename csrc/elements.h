// Conversions between the element types of tensors and the types that arithmetic is done in.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace clex {

enum class Element { fp32, fp16, bf16, fp64 };

template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

CLEX_INLINE float widen(float x) { return x; }
CLEX_INLINE double widen(double x) { return x; }
CLEX_INLINE float widen(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// the exponent is rebased by a product, which also normalises: branch-free, so that it vectorises.
CLEX_INLINE float widen(Fp16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t magnitude = word & 0x7fffffffu;
  const float normal = std::bit_cast<float>((magnitude >> 3) + 0x70000000u) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((magnitude >> 16) | 0x3f000000u) - 0.5f;
  const float value = magnitude < 0x04000000u ? subnormal : normal;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (word & 0x80000000u));
}

CLEX_INLINE void narrow(float value, float& x) { x = value; }
CLEX_INLINE void narrow(double value, double& x) { x = value; }

// rounds to nearest even by carrying half a unit into the bits that stay.
CLEX_INLINE void narrow(float value, Bf16& x) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  x.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// the sum with a power of two of the right size rounds to the bits that fp16 keeps.
CLEX_INLINE void narrow(float value, Fp16& x) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float saturated = std::bit_cast<float>(magnitude) * 0x1p112f * 0x1p-110f;
  const uint32_t exponent = std::max(magnitude & 0x7f800000u, 0x38800000u);
  const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>(exponent + 0x07800000u) + saturated);
  const uint32_t finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  x.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}

// compilers don't vectorise fp16 by the processor's own conversions, so whole rows have them by hand.
#if defined(__x86_64__)
CLEX_AVX2 inline void widen_row_f16c(const Fp16* x, float* row, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  for (; i < count; ++i) row[i] = widen(x[i]);
}

CLEX_AVX2 inline void narrow_row_f16c(const float* row, Fp16* x, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i), half);
  }
  for (; i < count; ++i) narrow(row[i], x[i]);
}
#endif

CLEX_INLINE void widen_row(const Fp16* x, float* row, int64_t count) {
#if defined(__x86_64__)
  if (active_isa() != Isa::baseline) return widen_row_f16c(x, row, count);
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) row[i] = widen(x[i]);
}

CLEX_INLINE void narrow_row(const float* row, Fp16* x, int64_t count) {
#if defined(__x86_64__)
  if (active_isa() != Isa::baseline) return narrow_row_f16c(row, x, count);
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(row[i], x[i]);
}

}  // namespace clex
