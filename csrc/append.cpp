// Token l of sequence b goes to slot kv_end[b] - L + l, which in pages is a row of page block_table[b, slot / P].
#include "append.h"

#include <cstring>
#include <optional>

namespace clex {
namespace {

// The first two indices of a token's rows in the cache.
struct Place {
  int64_t block, row;
};

std::optional<Place> place_of(const AppendCall& call, int64_t b, int64_t l) {
  const int64_t end = call.kv_end.at(b);
  // any number may stand there, and the smallest would overflow below.
  if (end <= 0) return std::nullopt;
  const int64_t slot = end - call.length + l;
  if (slot < 0 || slot >= call.capacity) return std::nullopt;
  if (!call.block_table.data) return Place{b, slot};
  const int64_t block = call.block_table.at(b, slot / call.page);
  if (block < 0 || block >= call.pages) return std::nullopt;
  return Place{block, slot % call.page};
}

}  // namespace

void append(const AppendCall& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / call.length, l = token % call.length;
    const std::optional<Place> place = place_of(call, b, l);
    if (!place) continue;
    for (const AppendTensor& tensor : call.tensors) {
      const int64_t* from = tensor.source_strides;
      const int64_t* to = tensor.target_strides;
      const char* source = tensor.source + b * from[0] + l * from[1];
      char* target = tensor.target + place->block * to[0] + place->row * to[1];
      for (int64_t h = 0; h < call.heads; ++h) {
        std::memcpy(target + h * to[2], source + h * from[2], call.row_bytes);
      }
    }
  }
}

}  // namespace clex
