// Bounds, lengths and page numbers, as callers have them.
#pragma once

#include <cstdint>

namespace clex {

// int32 or int64, strides in elements.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t strides[2] = {};

  int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * strides[0] + j * strides[1];
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

}  // namespace clex
