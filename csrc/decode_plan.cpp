// How a call is cut into items.
#include <algorithm>
#include <cmath>

#include "decode.h"

namespace clex {
namespace {

// slots of a range. Starting one costs as much as four blocks of keys (2 us, Zen 4).
constexpr int64_t kFewestSlots = 256, kMostSlots = 2048;
// of a sequence that has the slots for them.
constexpr int64_t kRanges = 8;
// rows of an item that takes several KV heads: their queries and sums should stay in the L2 cache.
constexpr int64_t kItemRows = 128;

int64_t choose_table(const DecodeCall& call, int64_t b, int64_t length) {
  if (call.index) return call.index[b * call.index_stride];
  if (call.train_length) return std::min((std::max<int64_t>(length, 1) - 1) / call.train_length, call.tables - 1);
  return call.tables == 1 ? 0 : b;
}

double scale_of(const DecodeCall& call, int64_t length) {
  if (call.log_base == 0.0) return call.scale;
  const double factor = std::log(static_cast<double>(std::max<int64_t>(length, 1))) / call.log_base;
  return call.scale * (call.log_clamped ? std::max(factor, 1.0) : factor);
}

DecodeSequence plan_sequence(const DecodePlan& plan, int64_t b) {
  const DecodeCall& call = *plan.call;
  DecodeSequence sequence;
  sequence.end = std::clamp<int64_t>(call.kv_end.at(b), 0, call.slots);
  sequence.begin = call.kv_start.data ? std::clamp<int64_t>(call.kv_start.at(b), 0, call.slots) : 0;
  const int64_t length = call.lengths.data ? call.lengths.at(b) : std::max<int64_t>(sequence.end - sequence.begin, 0);
  sequence.begin = std::max(sequence.begin, sequence.end - call.length - plan.window + 1);
  const int64_t tile = plan.tile;
  const int64_t tiles = ceil_div(sequence.end, tile) - sequence.begin / tile;
  const int64_t fewest = ceil_div(kFewestSlots, tile), most = ceil_div(kMostSlots, tile);
  sequence.range_slots = tile * std::clamp(ceil_div(tiles, kRanges), fewest, most);
  sequence.table = choose_table(call, b, length);
  sequence.scale = scale_of(call, length);
  const bool exists = sequence.table >= 0 && sequence.table < call.tables;
  sequence.broken = (call.rotate_q || call.rotate_k) && !(exists && sequence.end <= call.tiles * call.tile);
  const bool empty = sequence.begin >= sequence.end || sequence.broken;
  const int64_t first = sequence.begin / sequence.range_slots;
  sequence.ranges = empty ? 0 : ceil_div(sequence.end, sequence.range_slots) - first;
  return sequence;
}

}  // namespace

void plan_decode(const DecodeCall& call, Workspace (&workspaces)[2], DecodePlan& plan) {
  plan.call = &call;
  plan.tile = call.rotate_q || call.rotate_k ? call.tile : 64;
  const int64_t most = call.slots + call.length;
  plan.window = call.window ? std::min(call.window, most) : most;
  plan.group = call.heads / call.kv_heads;
  plan.rows = call.length * plan.group;
  plan.width = ceil_div(call.dim, 32) * 32;
  // where a slot's heads lie side by side, an item takes them together, to read whole rows.
  const bool token_major = call.keys.strides[2] < call.keys.strides[1];
  plan.head_block = token_major ? std::clamp<int64_t>(kItemRows / plan.rows, 1, call.kv_heads) : 1;
  plan.head_blocks = ceil_div(call.kv_heads, plan.head_block);

  plan.sequences = reinterpret_cast<DecodeSequence*>(workspaces[0].reserve(call.batch * sizeof(DecodeSequence)));
  for (int64_t b = 0; b < call.batch; plan.ranges += plan.sequences[b++].ranges) {
    plan.sequences[b] = plan_sequence(plan, b);
    plan.sequences[b].first_range = plan.ranges;
  }
  const auto carve = [&](Carver carver) {
    const int64_t rows = plan.ranges * call.kv_heads * plan.rows, size = call.element == Element::fp64 ? 8 : 4;
    plan.sums = carver.take<std::byte>(rows * plan.width * size);
    plan.weights = carver.take<std::byte>(rows * size);
    plan.maxima = carver.take<std::byte>(rows * size);
    return carver.bytes;
  };
  carve(Carver(workspaces[1].reserve(carve(Carver(nullptr)))));
  plan.items = plan.ranges * plan.head_blocks;
}

}  // namespace clex
