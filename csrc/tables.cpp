#include "tables.h"

#include <algorithm>
#include <vector>

#include "isa.h"

namespace clex {
namespace {

template <class T>
[[gnu::noinline]] void fill_far_row(double position, const double* freq, double amplitude, int64_t pairs,
                                    T* row) {
  for (int64_t i = 0; i < pairs; ++i) {
    double sine, cosine;
    sincos_far(position, freq[i], sine, cosine);
    row[i] = static_cast<T>(amplitude * cosine);
    row[pairs + i] = static_cast<T>(amplitude * sine);
  }
}

template <class T>
CLEX_INLINE void fill_row(double position, const double* freq, double amplitude, int64_t pairs, T* row) {
  double farthest = 0;
#pragma omp simd reduction(max : farthest)
  for (int64_t i = 0; i < pairs; ++i) {
    double sine, cosine;
    sincos_near(position, freq[i], sine, cosine);
    row[i] = static_cast<T>(amplitude * cosine);
    row[pairs + i] = static_cast<T>(amplitude * sine);
    const double size = __builtin_fabs(position * freq[i]);
    farthest = size > farthest ? size : farthest;
  }
  if (farthest > FARTHEST_ANGLE) fill_far_row(position, freq, amplitude, pairs, row);
}

template <class T>
CLEX_INLINE void rotate_row(const double* anchor, const double* step, int64_t pairs, T* row) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const double c = anchor[i], s = anchor[pairs + i];
    row[i] = static_cast<T>(c * step[i] - s * step[pairs + i]);
    row[pairs + i] = static_cast<T>(s * step[i] + c * step[pairs + i]);
  }
}

template <class T>
CLEX_INLINE void direct_body(const TableSpec& spec, int64_t begin, int64_t end, T* out) {
  const int64_t blocks = table_blocks(spec.rows);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t factor = block / blocks;
    const int64_t first = block % blocks * TABLE_TILE, last = std::min(first + TABLE_TILE, spec.rows);
    const double* freq = spec.freq + factor * spec.pairs;
    for (int64_t row = first; row < last; ++row) {
      T* const out_row = out + (factor * spec.rows + row) * 2 * spec.pairs;
      fill_row(table_position(spec, factor, row), freq, spec.amplitude, spec.pairs, out_row);
    }
  }
}

template <class T>
CLEX_INLINE void products_body(const TableSpec& spec, const double* steps, double* anchor, int64_t begin,
                               int64_t end, T* out) {
  const int64_t blocks = table_blocks(spec.rows), step_rows = std::min(spec.rows, TABLE_TILE);
  const int64_t width = 2 * spec.pairs;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t factor = block / blocks;
    const int64_t first = block % blocks * TABLE_TILE, last = std::min(first + TABLE_TILE, spec.rows);
    const double* freq = spec.freq + factor * spec.pairs;
    fill_row(table_position(spec, factor, first), freq, spec.amplitude, spec.pairs, anchor);
    for (int64_t row = first; row < last; ++row) {
      const double* step = steps + (factor * step_rows + row - first) * width;
      rotate_row(anchor, step, spec.pairs, out + (factor * spec.rows + row) * width);
    }
  }
}

CLEX_MULTIVERSION(direct,
                  (const TableSpec& spec, int64_t begin, int64_t end, T* out),
                  (spec, begin, end, out))
CLEX_MULTIVERSION(products,
                  (const TableSpec& spec, const double* steps, double* anchor, int64_t begin, int64_t end,
                   T* out),
                  (spec, steps, anchor, begin, end, out))

}  // namespace

template <class T>
void fill_table_direct(const TableSpec& spec, int64_t begin, int64_t end, T* out) {
  direct(spec, begin, end, out);
}

template <class T>
void fill_table_by_products(const TableSpec& spec, const double* steps, int64_t begin, int64_t end, T* out) {
  std::vector<double> anchor(2 * spec.pairs);
  products(spec, steps, anchor.data(), begin, end, out);
}

template void fill_table_direct(const TableSpec&, int64_t, int64_t, float*);
template void fill_table_direct(const TableSpec&, int64_t, int64_t, double*);
template void fill_table_by_products(const TableSpec&, const double*, int64_t, int64_t, float*);
template void fill_table_by_products(const TableSpec&, const double*, int64_t, int64_t, double*);

}  // namespace clex
