// The steps of decode_tiles.h by the processor's own instructions: AVX-512 with its bf16 part, whose dot products take
// bf16 keys and queries, and bf16 values and weights, in pairs. fp16 is widened, fp32 is used as it is.
//
// Keys and queries stand in an order that suits both: 16 values x[i..] and then the 16 of their partners x[R + i..],
// filled up with zeros; then the channels that are not rotated, filled up to a multiple of 32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "decode_tiles.h"
#include "elements.h"

#if defined(__x86_64__)

#define CLEX_NATIVE CLEX_AVX512_BF16 __attribute__((always_inline)) static inline

namespace clex {

constexpr int64_t kLanes = 16;

// the first `count` of 16 or 32 lanes.
CLEX_NATIVE __mmask32 lanes32(int64_t count) {
  return count >= 32 ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1u;
}
CLEX_NATIVE __mmask16 lanes16(int64_t count) { return lanes32(std::min<int64_t>(count, 16)); }

// in lane i: i in the upper word, 0 in the lower.
CLEX_NATIVE __m512i upper_words() {
  return _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
}

CLEX_NATIVE __m512 load_lanes(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
CLEX_NATIVE __m512 load_lanes(const Fp16* x, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}
CLEX_NATIVE __m512 load_lanes(const Bf16* x, __mmask16 lanes) {
  // word i to the upper half of lane i: one shuffle instead of a conversion and a shift.
  const __m512i bits = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper_words(), bits));
}

// 32 elements of two vectors.
CLEX_NATIVE void store_both(float* y, __m512 first, __m512 second) {
  _mm512_store_ps(y, first);
  _mm512_store_ps(y + kLanes, second);
}
CLEX_NATIVE void store_both(Bf16* y, __m512 first, __m512 second) {
  _mm512_store_si512(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// the first `count` of 32 elements as they are.
template <class T, class Key>
CLEX_NATIVE void pass_lanes(const T* x, int64_t count, Key* y) {
  if constexpr (std::is_same_v<T, Key> && sizeof(T) == 2) {
    _mm512_store_si512(y, _mm512_maskz_loadu_epi16(lanes32(count), x));
  } else {
    store_both(y, load_lanes(x, lanes16(count)), load_lanes(x + kLanes, lanes16(count - kLanes)));
  }
}

// sum + a b by lane, of fp32 or of pairs of bf16.
template <class Key>
CLEX_NATIVE __m512 dot(__m512 a, __m512 b, __m512 sum) {
  if constexpr (std::is_same_v<Key, float>) return _mm512_fmadd_ps(a, b, sum);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// keeps compilers from loading it once more at each use: loads are the bottleneck.
CLEX_NATIVE __m512 load_once(__m512 x) {
  asm("" : "+v"(x));
  return x;
}

// 16 pairs (x[0..], x[R..]) rotated by their cosines and sines.
template <bool kConjugate, class T, class Key>
CLEX_NATIVE void rotate_lanes(const T* x, const float* row, int64_t pairs, __mmask16 lanes, Key* y) {
  const __m512 x0 = load_once(load_lanes(x, lanes)), x1 = load_once(load_lanes(x + pairs, lanes));
  const __m512 cosine = load_once(load_lanes(row, lanes)), sine = load_once(load_lanes(row + pairs, lanes));
  const __m512 direct0 = _mm512_mul_ps(x0, cosine), direct1 = _mm512_mul_ps(x1, cosine);
  if constexpr (kConjugate) {
    store_both(y, _mm512_fmadd_ps(x1, sine, direct0), _mm512_fnmadd_ps(x0, sine, direct1));
  } else {
    store_both(y, _mm512_fnmadd_ps(x1, sine, direct0), _mm512_fmadd_ps(x0, sine, direct1));
  }
}

// y [kCount, key_width] of x [kCount, D], rotated by rows of a table or by their conjugates.
template <int kCount, bool kConjugate, class T, class Key>
CLEX_NATIVE void rotate_rows(const T* x, int64_t stride, const float* table, int64_t table_stride, Key* y,
                             int64_t key_width, const HeadShape& shape) {
  const int64_t pairs = shape.pairs, dim = shape.dim;
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes, y += 32) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      rotate_lanes<kConjugate>(x + k * stride + i, table + k * table_stride + i, pairs, 0xffff, y + k * key_width);
    }
  }
  if (i < pairs) {
    const __mmask16 lanes = lanes16(pairs - i);
    for (int k = 0; k < kCount; ++k) {
      rotate_lanes<kConjugate>(x + k * stride + i, table + k * table_stride + i, pairs, lanes, y + k * key_width);
    }
    y += 32;
  }
  for (int64_t d = 2 * pairs; d < dim; d += 32, y += 32) {
    for (int k = 0; k < kCount; ++k) pass_lanes(x + k * stride + d, dim - d, y + k * key_width);
  }
}

// lane i: the sum of the lanes of sums[i].
CLEX_NATIVE __m512 sum_lanes(const __m512 (&sums)[16]) {
  __m512 quarters[4], halves[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 *a = sums + 4 * i, *b = a + 2;
    const __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
    const __m512d low = _mm512_castps_pd(left), high = _mm512_castps_pd(right);
    quarters[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// Stores scores [kRows, 16 / kRows] into columns of scores [rows, 16].
template <int kRows>
CLEX_NATIVE void store_scores(float* scores, __m512 block) {
  if constexpr (kRows == 1) _mm512_storeu_ps(scores, block);
  if constexpr (kRows == 2) {
    _mm256_storeu_ps(scores, _mm512_castps512_ps256(block));
    _mm256_storeu_ps(scores + kBlock, _mm512_extractf32x8_ps(block, 1));
  }
  if constexpr (kRows == 4) {
    _mm_storeu_ps(scores, _mm512_castps512_ps128(block));
    _mm_storeu_ps(scores + kBlock, _mm512_extractf32x4_ps(block, 1));
    _mm_storeu_ps(scores + 2 * kBlock, _mm512_extractf32x4_ps(block, 2));
    _mm_storeu_ps(scores + 3 * kBlock, _mm512_extractf32x4_ps(block, 3));
  }
}

// kRows queries times 16 / kRows keys: 16 sums fill the registers and hide the latency.
template <int kRows, class Key>
CLEX_NATIVE __m512 score_block(const Key* q, const Key* keys, int64_t width) {
  constexpr int kKeys = 16 / kRows;
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 64 / sizeof(Key)) {
    __m512 x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = load_once(_mm512_loadu_ps(q + r * width + d));
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      const __m512 key = load_once(_mm512_load_ps(keys + k * width + d));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r * kKeys + k] = dot<Key>(x[r], key, sums[r * kKeys + k]);
    }
  }
  return sum_lanes(sums);
}

// Weights of one key, or bf16 weights of two, beside the values that they multiply: both 32 channels long.
template <class T>
struct Terms {
  static constexpr int64_t kKeys = 1;
  __m512 low, high;

  CLEX_AVX512_BF16 __attribute__((always_inline)) Terms(const T* v, int64_t, __mmask32 lanes)
      : low(load_lanes(v, static_cast<__mmask16>(lanes))), high(load_lanes(v + kLanes, lanes >> 16)) {}
  CLEX_AVX512_BF16 __attribute__((always_inline)) void add(const float* weights, __m512& first, __m512& second) const {
    const __m512 weight = _mm512_set1_ps(*weights);
    first = _mm512_fmadd_ps(weight, low, first);
    second = _mm512_fmadd_ps(weight, high, second);
  }
};

template <>
struct Terms<Bf16> {
  static constexpr int64_t kKeys = 2;
  __m512bh low, high;

  CLEX_AVX512_BF16 __attribute__((always_inline)) Terms(const Bf16* v, int64_t stride, __mmask32 lanes) {
    const __m512i first = _mm512_maskz_loadu_epi16(lanes, v), second = _mm512_maskz_loadu_epi16(lanes, v + stride);
    // words 0, 32, 1, 33, ...: a channel of the two keys side by side.
    const __m512i words = _mm512_srli_epi32(upper_words(), 16);
    const __m512i order = _mm512_or_si512(_mm512_or_si512(words, upper_words()), _mm512_set1_epi32(32 << 16));
    const __m512i later = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    low = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, order, second));
    high = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(first, later, second));
  }
  CLEX_AVX512_BF16 __attribute__((always_inline)) void add(const Bf16* weights, __m512& first, __m512& second) const {
    const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(weights)));
    first = _mm512_dpbf16_ps(first, low, pair);
    second = _mm512_dpbf16_ps(second, high, pair);
  }
};

// sums [kRows, 32 kUnits] += weights [kRows, 16] times values [16, ..]; only the last 32 channels may lack some.
template <int kRows, int kUnits, class T, class Weight>
CLEX_NATIVE void accumulate_channels(const T* values, int64_t stride, const T* next, const Weight* weights, float* sums,
                                     int64_t width, int64_t dim, __mmask32 lanes) {
  __m512 low[kRows * kUnits], high[kRows * kUnits];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kUnits; ++i) {
    float* sum = sums + i / kUnits * width + i % kUnits * 32;
    low[i] = _mm512_load_ps(sum);
    high[i] = _mm512_load_ps(sum + kLanes);
  }
  for (int64_t j = 0; j < kBlock; j += Terms<T>::kKeys) {
    if (next) {
      for (int64_t k = j; k < j + Terms<T>::kKeys; ++k) prefetch_row(next + k * stride, dim);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const Terms<T> terms(values + j * stride + 32 * u, stride, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) terms.add(weights + r * kBlock + j, low[r * kUnits + u], high[r * kUnits + u]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kUnits; ++i) {
    float* sum = sums + i / kUnits * width + i % kUnits * 32;
    _mm512_store_ps(sum, low[i]);
    _mm512_store_ps(sum + kLanes, high[i]);
  }
}

template <int kRows, class T, class Weight>
CLEX_NATIVE void accumulate_rows_native(const T* values, int64_t stride, const T* next, const Weight* weights,
                                        float* sums, const HeadShape& shape) {
  constexpr int kUnits = kRows == 4 ? 2 : 4;
  const int64_t width = shape.width, dim = shape.dim;
  int64_t d = 0;
  for (; d + 32 * kUnits <= dim; d += 32 * kUnits, next = nullptr) {
    accumulate_channels<kRows, kUnits>(values + d, stride, next, weights, sums + d, width, dim, ~0u);
  }
  for (; d < dim; d += 32, next = nullptr) {
    accumulate_channels<kRows, 1>(values + d, stride, next, weights, sums + d, width, dim, lanes32(dim - d));
  }
}

template <class T>
struct NativeTiles {
  // of rotated keys and queries, and of weights.
  using Key = std::conditional_t<std::is_same_v<T, Bf16>, Bf16, float>;

  static int64_t key_width(const HeadShape& shape) {
    return (shape.pairs + 15) / 16 * 32 + (shape.dim - 2 * shape.pairs + 31) / 32 * 32;
  }

  CLEX_AVX512_BF16 static void turn(const float* q, int64_t rows, const float* coarse, Key* turned,
                                  const HeadShape& shape) {
    const int64_t width = key_width(shape);
    for (int64_t r = 0; r < rows; ++r) {
      rotate_rows<1, true>(q + r * shape.width, 0, coarse, 0, turned + r * width, width, shape);
    }
  }

  CLEX_AVX512_BF16 static void score(const Key* q, int64_t rows, const KeyBlock<T>& keys, Key* rotated, float* scores,
                                   const HeadShape& shape) {
    if (rows >= 4) return score_by<4>(q, rows, keys, rotated, scores, shape);
    if (rows >= 2) return score_by<2>(q, rows, keys, rotated, scores, shape);
    score_by<1>(q, rows, keys, rotated, scores, shape);
  }

  // `scratch` has room for [rows, 16].
  CLEX_AVX512_BF16 static void accumulate(const T* values, int64_t stride, const T* next, const float* weights,
                                        int64_t rows, float* scratch, float* sums, const HeadShape& shape) {
    const Key* w;
    if constexpr (std::is_same_v<Key, float>) {
      w = weights;
    } else {
      Key* narrowed = reinterpret_cast<Key*>(scratch);
      for (int64_t i = 0; i < rows * kBlock; i += kLanes) store16(narrowed + i, _mm512_loadu_ps(weights + i));
      w = narrowed;
    }
    const int64_t width = shape.width;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, next = nullptr) {
      accumulate_rows_native<4>(values, stride, next, w + r * kBlock, sums + r * width, shape);
    }
    for (; r + 2 <= rows; r += 2, next = nullptr) {
      accumulate_rows_native<2>(values, stride, next, w + r * kBlock, sums + r * width, shape);
    }
    if (r < rows) accumulate_rows_native<1>(values, stride, next, w + r * kBlock, sums + r * width, shape);
  }

 private:
  // few keys at a time are rotated and used at once, so that they don't drive the cache's out of the L1 cache.
  template <int kRows>
  CLEX_NATIVE void score_by(const Key* q, int64_t rows, const KeyBlock<T>& keys, Key* rotated, float* scores,
                            const HeadShape& shape) {
    constexpr int64_t kKeys = 16 / kRows;
    const int64_t width = key_width(shape);
    for (int64_t j = 0; j < kBlock; j += kKeys) {
      for (int64_t k = 0; k < kKeys; k += 4) {
        const T* data = keys.data + (j + k) * keys.stride;
        const float* fine = keys.fine + (j + k) * keys.fine_stride;
        for (int64_t i = j + k; i < j + k + 4; ++i) prefetch_row(keys.next + i * keys.stride, shape.dim);
        rotate_rows<4, false>(data, keys.stride, fine, keys.fine_stride, rotated + k * width, width, shape);
      }
      for (int64_t r = 0; r < rows; r += kRows) {
        // the last rows may come twice.
        const int64_t first = std::min(r, rows - kRows);
        store_scores<kRows>(scores + first * kBlock + j, score_block<kRows>(q + first * width, rotated, width));
      }
    }
  }
};

}  // namespace clex
#endif
