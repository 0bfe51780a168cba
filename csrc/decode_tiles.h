// Steps of decoding over a block of 16 keys, for all rows (queries of all heads) of a KV head; portable.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "decode.h"
#include "elements.h"
#include "fast_math.h"
#include "isa.h"

namespace clex {

struct HeadShape {
  int64_t dim, pairs, width;  // D, R if keys are rotated else 0, and D in whole vectors, the rest zero
};

// What one KV head's rows have summed up so far.
template <class R>
struct RowState {
  R* values;   // [rows, width], sums of weights times values
  R* weights;  // [rows, 16], sums of weights, by lane
  R* maxima;   // [rows], logits that both are relative to
};

template <class R>
constexpr R kNothingSeen = std::numeric_limits<R>::lowest();

// A block of keys [16, D] in the cache, the rows of the fine table that rotate them, and the block that comes next.
template <class T>
struct KeyBlock {
  const T* data;
  int64_t stride;
  const T* next;
  const Real<T>* fine;
  int64_t fine_stride;
};

// into the L2 cache: more rows are under way than the L1 cache could wait for.
template <class T>
CLEX_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

template <class T>
CLEX_INLINE void widen_row(const T* x, Real<T>* __restrict y, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) y[d] = widen(x[d]);
}

// y = x [D] rotated by a row of R cosines and R sines, or by its conjugate.
template <class T>
CLEX_INLINE void rotate_row(const T* x, Real<T>* __restrict y, const Real<T>* row, bool conjugate,
                            const HeadShape& shape) {
  const int64_t pairs = shape.pairs;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const Real<T> x0 = widen(x[i]), x1 = widen(x[pairs + i]);
    const Real<T> cosine = row[i], sine = conjugate ? -row[pairs + i] : row[pairs + i];
    y[i] = x0 * cosine - x1 * sine;
    y[pairs + i] = x1 * cosine + x0 * sine;
  }
  widen_row(x + 2 * pairs, y + 2 * pairs, shape.dim - 2 * pairs);
}

// turned [rows, width] = q by the conjugate of the coarse table's row.
template <class R>
CLEX_INLINE void turn_body(const R* q, int64_t rows, const R* coarse, R* turned, const HeadShape& shape) {
  for (int64_t r = 0; r < rows; ++r) rotate_row(q + r * shape.width, turned + r * shape.width, coarse, true, shape);
}

// lanes of a sum, by halves: compilers add up a vector's lanes one after the other.
template <class R>
CLEX_INLINE R sum_lanes(const R* sums) {
  R eight[8], four[4];
#pragma omp simd
  for (int i = 0; i < 8; ++i) eight[i] = sums[i] + sums[8 + i];
#pragma omp simd
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[4 + i];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class R>
CLEX_INLINE R max_lanes(const R* x) {
  R eight[8], four[4];
#pragma omp simd
  for (int i = 0; i < 8; ++i) eight[i] = x[i] > x[8 + i] ? x[i] : x[8 + i];
#pragma omp simd
  for (int i = 0; i < 4; ++i) four[i] = eight[i] > eight[4 + i] ? eight[i] : eight[4 + i];
  return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

template <class R, int kRows>
CLEX_INLINE void score_rows(const R* q, const R* keys, int64_t width, R* scores) {
  for (int64_t j = 0; j < kBlock; ++j) {
    const R* key = keys + j * width;
    R sums[kRows][16] = {};
    for (int64_t d = 0; d < width; d += 16) {
      for (int r = 0; r < kRows; ++r) {
#pragma omp simd
        for (int i = 0; i < 16; ++i) sums[r][i] += q[r * width + d + i] * key[d + i];
      }
    }
    for (int r = 0; r < kRows; ++r) scores[r * kBlock + j] = sum_lanes(sums[r]);
  }
}

// scores [rows, 16] = q k'^T; `rotated` has room for [16, width].
template <class T>
CLEX_INLINE void score_body(const Real<T>* q, int64_t rows, const KeyBlock<T>& keys, Real<T>* rotated, Real<T>* scores,
                            const HeadShape& shape) {
  const int64_t width = shape.width;
  for (int64_t j = 0; j < kBlock; ++j) {
    prefetch_row(keys.next + j * keys.stride, shape.dim);
    rotate_row(keys.data + j * keys.stride, rotated + j * width, keys.fine + j * keys.fine_stride, false, shape);
  }
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) score_rows<Real<T>, 4>(q + r * width, rotated, width, scores + r * kBlock);
  for (; r < rows; ++r) score_rows<Real<T>, 1>(q + r * width, rotated, width, scores + r * kBlock);
}

// e^x for x <= 0, exactly 0 far out.
template <class R>
CLEX_INLINE R weight_of(R x) {
  const R lowest = sizeof(R) == 8 ? R(-708) : R(-87);
  return x < lowest ? R(0) : fast_exp(x);
}

// Raises a row's maximum, and scales down what is relative to it.
template <class R>
CLEX_INLINE void raise_maximum(R top, int64_t r, const RowState<R>& state, int64_t width) {
  const R decay = weight_of(state.maxima[r] - top);
  R* __restrict values = state.values + r * width;
  R* __restrict weights = state.weights + r * kBlock;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) values[d] *= decay;
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) weights[j] *= decay;
  state.maxima[r] = top;
}

// Turns scores into weights relative to the rows' maxima, which may rise, and adds them up.
template <class R>
CLEX_INLINE void weigh_body(R* __restrict scores, int64_t rows, const RowState<R>& state, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const R top = max_lanes(scores + r * kBlock);
    if (top > state.maxima[r]) raise_maximum(top, r, state, width);
  }
  for (int64_t r = 0; r < rows; ++r) {
    R* __restrict s = scores + r * kBlock;
    R* __restrict weights = state.weights + r * kBlock;
    const R top = state.maxima[r];
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      s[j] = weight_of(s[j] - top);
      weights[j] += s[j];
    }
  }
}

template <class R>
CLEX_INLINE void cap_body(R* scores, int64_t rows, R softcap) {
#pragma omp simd
  for (int64_t i = 0; i < rows * kBlock; ++i) scores[i] = softcap * fast_tanh(scores[i] / softcap);
}

// two rows share the loads of four keys' values, which then cover those of the sums.
template <class R, int kRows>
CLEX_INLINE void accumulate_rows(const R* values, int64_t stride, const R* weights, R* __restrict sums, int64_t width,
                                 int64_t dim) {
  for (int64_t j = 0; j < kBlock; j += 4) {
    const R* v = values + j * stride;
    const R* w = weights + j;
    R* __restrict second = sums + width;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
      const R v0 = v[d], v1 = v[stride + d], v2 = v[2 * stride + d], v3 = v[3 * stride + d];
      sums[d] += w[0] * v0 + w[1] * v1 + w[2] * v2 + w[3] * v3;
      if (kRows > 1) {
        second[d] += w[kBlock] * v0 + w[kBlock + 1] * v1 + w[kBlock + 2] * v2 + w[kBlock + 3] * v3;
      }
    }
  }
}

// sums [rows, width] += weights [rows, 16] times values 16 x D; `widened` has room for these.
template <class T>
CLEX_INLINE void accumulate_body(const T* values, int64_t stride, const T* next, const Real<T>* weights, int64_t rows,
                                 Real<T>* widened, Real<T>* sums, const HeadShape& shape) {
  using R = Real<T>;
  const int64_t width = shape.width, dim = shape.dim;
  const R* v;
  int64_t v_stride = stride;
  for (int64_t j = 0; j < kBlock; ++j) prefetch_row(next + j * stride, dim);
  if constexpr (std::is_same_v<T, R>) {
    v = values;
  } else {
    for (int64_t j = 0; j < kBlock; ++j) widen_row(values + j * stride, widened + j * width, dim);
    v = widened;
    v_stride = width;
  }
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    accumulate_rows<R, 2>(v, v_stride, weights + r * kBlock, sums + r * width, width, dim);
  }
  if (r < rows) accumulate_rows<R, 1>(v, v_stride, weights + r * kBlock, sums + r * width, width, dim);
}

CLEX_MULTIVERSION(turn, (const T* q, int64_t rows, const T* coarse, T* turned, const HeadShape& shape),
                  (q, rows, coarse, turned, shape))
CLEX_MULTIVERSION(score,
                  (const Real<T>* q, int64_t rows, const KeyBlock<T>& keys, Real<T>* rotated, Real<T>* scores,
                   const HeadShape& shape),
                  (q, rows, keys, rotated, scores, shape))
CLEX_MULTIVERSION(cap, (T * scores, int64_t rows, T softcap), (scores, rows, softcap))
CLEX_MULTIVERSION(weigh, (T * scores, int64_t rows, const RowState<T>& state, int64_t width),
                  (scores, rows, state, width))
CLEX_MULTIVERSION(accumulate,
                  (const T* values, int64_t stride, const T* next, const Real<T>* weights, int64_t rows,
                   Real<T>* widened, Real<T>* sums, const HeadShape& shape),
                  (values, stride, next, weights, rows, widened, sums, shape))

template <class T>
struct PortableTiles {
  using Key = Real<T>;  // of rotated keys and of queries

  static int64_t key_width(const HeadShape& shape) { return shape.width; }

  static constexpr auto turn = clex::turn<Real<T>>;
  static constexpr auto score = clex::score<T>;
  static constexpr auto accumulate = clex::accumulate<T>;
};

}  // namespace clex
