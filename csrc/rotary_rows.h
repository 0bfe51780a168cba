// A token's row of the factored table: the complex product of a coarse and a fine row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "isa.h"
#include "rotary.h"

namespace clex {

CLEX_INLINE int64_t table_of(const RotaryCall& call, int64_t b) {
  return call.index ? call.index[b * call.index_stride] : call.tables == 1 ? 0 : b;
}

// Row of the table for a token, or NaN; returns the value of its position.
template <class R>
CLEX_INLINE double fill_row(const RotaryCall& call, int64_t b, int64_t l, R* __restrict cosine,
                            R* __restrict sine) {
  const int64_t* strides = call.position_ids_strides;
  const int64_t id = call.position_ids ? call.position_ids[b * strides[0] + l * strides[1]] : l;
  const int64_t table = table_of(call, b), position = id + call.offset, pairs = call.pairs;
  if (table < 0 || table >= call.tables || position < 0 || position >= call.tiles * call.tile) {
    std::fill_n(cosine, pairs, std::numeric_limits<R>::quiet_NaN());
    std::fill_n(sine, pairs, std::numeric_limits<R>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  const int64_t c = position / call.tile, j = position % call.tile;
  const R* coarse = static_cast<const R*>(call.coarse);
  const R* fine = static_cast<const R*>(call.fine);
  coarse += table * call.coarse_strides[0] + c * call.coarse_strides[1];
  fine += table * call.fine_strides[0] + j * call.fine_strides[1];
  const R sign = call.conjugate ? R(-1) : R(1);
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const R cc = coarse[i], cs = coarse[pairs + i], fc = fine[i], fs = fine[pairs + i];
    cosine[i] = cc * fc - cs * fs;
    sine[i] = sign * (cs * fc + cc * fs);
  }
  if (!call.positions) return static_cast<double>(position);
  return call.positions[table * call.positions_strides[0] + position * call.positions_strides[1]];
}

}  // namespace clex
