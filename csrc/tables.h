// Rows of cosines and sines of position * freq, in fp64: what host and device share, and the host loops.
//
// position * freq is kept as hi + lo (one product, its rounding error from an FMA), so that an angle of 2^31,
// whose ulp is 5e-7, loses nothing. Cody-Waite reduction: n = round(2 hi / pi), r = hi - n P1 - n P2 + lo with
// pi/2 = P1 + P2 to 106 bits; hi - n P1 is exact in one FMA. The polynomials on [-pi/4, pi/4] are fdlibm's.
// Absolute error 2e-16.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CLEX_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define CLEX_SHARED_INLINE static inline __attribute__((always_inline))
#endif

namespace clex {

// positions per coarse row, and coarse rows per anchor of the two-level products.
constexpr int64_t TABLE_TILE = 64;

// the reduction is exact up to here and fails from 2^51 on; farther angles go to libm.
constexpr double FARTHEST_ANGLE = 1099511627776.0;

// sin and cos of position * freq up to FARTHEST_ANGLE, without a branch; NaN and infinity give NaN.
CLEX_SHARED_INLINE void sincos_near(double position, double freq, double& sine, double& cosine) {
  // adding 1.5 * 2^52 rounds to an integer and leaves its low bits at the end of the mantissa.
  constexpr double rounder = 6755399441055744.0;
  const double hi = position * freq;
  const double lo = fma(position, freq, -hi);
  const double shifted = fma(hi, 0.63661977236758134308, rounder);
  const double n = shifted - rounder;
  const double r = fma(-n, 1.57079632679489655800, hi) + fma(-n, 6.12323399573676603587e-17, lo);

  const double z = r * r;
  double s = 1.58969099521155010221e-10;
  s = fma(s, z, -2.50507602534068634195e-08);
  s = fma(s, z, 2.75573137070700676789e-06);
  s = fma(s, z, -1.98412698298579493134e-04);
  s = fma(s, z, 8.33333333332248946124e-03);
  s = fma(s, z, -1.66666666666666324348e-01);
  s = fma(s * z, r, r);
  double c = -1.13596475577881948265e-11;
  c = fma(c, z, 2.08757232129817482790e-09);
  c = fma(c, z, -2.75573143513906633035e-07);
  c = fma(c, z, 2.48015872894767294178e-05);
  c = fma(c, z, -1.38888888888741095749e-03);
  c = fma(c, z, 4.16666666666666019037e-02);
  c = fma(c * z, z, fma(z, -0.5, 1.0));

  uint64_t quadrant;
  memcpy(&quadrant, &shifted, sizeof quadrant);
  const bool swapped = quadrant & 1;
  const double sine_size = swapped ? c : s;
  const double cosine_size = swapped ? s : c;
  sine = (quadrant & 2) ? -sine_size : sine_size;
  cosine = ((quadrant + 1) & 2) ? -cosine_size : cosine_size;
}

// the same for any angle: libm's reduction of hi, then a rotation by lo.
CLEX_SHARED_INLINE void sincos_far(double position, double freq, double& sine, double& cosine) {
  const double hi = position * freq;
  const double lo = fma(position, freq, -hi);
  const double s = sin(hi), c = cos(hi), ds = sin(lo), dc = cos(lo);
  sine = s * dc + c * ds;
  cosine = c * dc - s * ds;
}

// What a table is made of: freq [T, R]; positions [T, rows], or one row for all, or null for 0, spacing, ...
struct TableSpec {
  const double* freq;
  const double* positions;
  int64_t factors, rows, pairs;
  int64_t position_stride;  // 0 where one row of positions serves all factors
  double spacing, amplitude;
};

CLEX_SHARED_INLINE double table_position(const TableSpec& spec, int64_t factor, int64_t row) {
  if (spec.positions) return spec.positions[factor * spec.position_stride + row];
  return static_cast<double>(row) * spec.spacing;
}

// Fills out [T, rows, 2, R] on a CUDA device, in order on `stream`. Null, or what went wrong.
template <class T>
const char* launch_fill_table(const TableSpec& spec, T* out, void* stream);

#ifndef __CUDACC__

// anchors (every TABLE_TILE-th row) of one factor that `rows` rows need.
inline int64_t table_blocks(int64_t rows) { return (rows + TABLE_TILE - 1) / TABLE_TILE; }

// Fills blocks [begin, end) of out [T, rows, 2, R], TABLE_TILE rows a block, block b belonging to factor
// b / table_blocks(rows). Every row by its own sines and cosines.
template <class T>
void fill_table_direct(const TableSpec& spec, int64_t begin, int64_t end, T* out);

// Evenly spaced rows as products of an anchor and one of steps [T, min(rows, TABLE_TILE), 2, R], which are
// fill_table_direct's first rows at amplitude 1. Anchors stand at fixed rows, so that a longer table begins
// with the shorter one.
template <class T>
void fill_table_by_products(const TableSpec& spec, const double* steps, int64_t begin, int64_t end, T* out);

#endif

}  // namespace clex
