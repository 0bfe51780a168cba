// Writes the keys and values of new tokens to their slots of a cache; torch-free.
#pragma once

#include <cstdint>

#include "integers.h"

namespace clex {

// New rows [B, L, G, D] and a cache [B, S, G, D], or a pool of pages [pages, P, G, D]; strides in bytes over the first
// three, unit stride in D.
struct AppendTensor {
  const char* source = nullptr;
  char* target = nullptr;
  int64_t source_strides[3] = {};
  int64_t target_strides[3] = {};
};

struct AppendCall {
  AppendTensor tensors[2];  // of keys, of values
  int64_t batch = 0, length = 0, heads = 0, row_bytes = 0;
  int64_t capacity = 0;  // slots of a sequence
  Integers kv_end;       // [B]

  // [B, pages of a sequence]; without data a sequence's slots are rows of the cache.
  Integers block_table;
  int64_t pages = 0, page = 0;
};

// Writes the tokens [begin, end) of the B L tokens of a call, but those whose slot or page does not exist.
void append(const AppendCall& call, int64_t begin, int64_t end);

}  // namespace clex
