// Rotates q and k by factored tables, and back; torch-free.
#pragma once

#include <cstdint>

#include "elements.h"

namespace clex {

// One tensor [B, L, H, D], strides in elements over B, L and H, unit stride in D.
struct RotaryTensor {
  int64_t heads = 0;
  const void* source = nullptr;
  void* target = nullptr;         // equals source when in place
  const void* rotated = nullptr;  // the saved y of the forward pass, for dfreq alone
  int64_t source_strides[3] = {};
  int64_t target_strides[3] = {};
  int64_t rotated_strides[3] = {};
};

struct RotaryCall {
  Element element = Element::fp32;
  RotaryTensor tensors[2];
  int64_t batch = 0, length = 0, dim = 0, pairs = 0;
  bool conjugate = false;

  // coarse [T, C, 2, R] and fine [T, F, 2, R], fp32 (fp64 for fp64 elements), strides over T and C or F.
  const void* coarse = nullptr;
  const void* fine = nullptr;
  int64_t coarse_strides[2] = {};
  int64_t fine_strides[2] = {};
  int64_t tables = 0, tiles = 0, tile = 0;

  // position values [T or 1, C F] for dfreq where they are not 0, 1, 2, ...
  const double* positions = nullptr;
  int64_t positions_strides[2] = {};

  const int64_t* index = nullptr;  // [B], which table a sequence uses
  int64_t index_stride = 0;
  const int64_t* position_ids = nullptr;  // [B or 1, L]
  int64_t position_ids_strides[2] = {};
  int64_t offset = 0;
};

// Rotates the tokens [begin, end) of the B L tokens of a call. A position or index out of range gives NaN.
void rotary(const RotaryCall& call, int64_t begin, int64_t end);

// Chunks are fixed by the shape alone, so that dfreq does not depend on the number of threads.
int64_t rotary_bwd_chunks(const RotaryCall& call);

// As rotary, for the chunks [begin, end), and writes each chunk's share of dfreq to partials [chunks, R].
void rotary_bwd(const RotaryCall& call, int64_t begin, int64_t end, double* partials);

// Adds the partials in order to dfreq [T, R], which holds zeros.
void rotary_bwd_reduce(const RotaryCall& call, const double* partials, double* dfreq);

// Asks for huge pages behind fresh memory about to be written: page faults cost more than the writing.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace clex
