// Works on the items of a plan: a range of a sequence's slots, block by block, for one KV head or several.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "decode.h"
#include "decode_tiles.h"

namespace clex {

// slots between a block and the one that is fetched meanwhile, perhaps the next item's.
constexpr int64_t kAhead = 4 * kBlock;

// slots [first, last) that a query sees.
struct Span {
  int64_t first, last;
};

inline Span visible_span(const DecodePlan& plan, const DecodeSequence& sequence, int64_t l) {
  const int64_t position = sequence.end - plan.call->length + l;
  return {std::max(sequence.begin, position - plan.window + 1), position + 1};
}

// Works on items by one thread's memory.
template <class T, class Tiles>
class ItemWorker {
  using R = Real<T>;
  using Key = typename Tiles::Key;

 public:
  ItemWorker(const DecodePlan& plan, Workspace& workspace)
      : plan_(plan),
        call_(*plan.call),
        shape_{call_.dim, call_.rotate_k ? call_.pairs : 0, plan.width},
        key_width_(Tiles::key_width(shape_)),
        tile_(plan.tile) {
    Carver counter(nullptr);
    carve(counter);
    Carver carver(workspace.reserve(counter.bytes));
    carve(carver);
    // beyond D zeros stay.
    std::memset(static_cast<void*>(queries_), 0, plan.head_block * plan.rows * plan.width * sizeof(R));
    std::memset(static_cast<void*>(turned_), 0, plan.head_block * plan.rows * key_width_ * sizeof(Key));
    std::memset(static_cast<void*>(rotated_), 0, kBlock * key_width_ * sizeof(Key));
  }

  // `upcoming` is what this thread works on next, if there is anything.
  void run(int64_t item, int64_t upcoming) {
    item_ = describe(item);
    next_ = upcoming < plan_.items ? describe(upcoming) : Item{};
    table_ = call_.rotate_q || call_.rotate_k ? item_.sequence->table : 0;
    for (int64_t g = item_.first_head; g < item_.last_head; ++g) start_head(g);
    for (int64_t slot = item_.begin; slot < item_.last; slot += kBlock) {
      const Pointers here = locate(item_, slot);
      if (!here.keys) return poison();
      if (slot == item_.begin || slot % tile_ == 0) turn_queries(slot / tile_);
      block_ = {slot, std::max(item_.first, slot) - slot, std::min(item_.last, slot + kBlock) - slot};
      const Pointers ahead = look_ahead(slot + kAhead);
      for (int64_t g = item_.first_head; g < item_.last_head; ++g) step(g, here, ahead.keys ? ahead : here);
    }
    for (int64_t g = item_.first_head; g < item_.last_head; ++g) finish_head(g);
  }

 private:
  // slots [first, last) of a sequence, from the block at `begin` on, for KV heads [first_head, last_head).
  struct Item {
    const DecodeSequence* sequence = nullptr;
    int64_t b = 0, range = 0, first_head = 0, last_head = 0, begin = 0, first = 0, last = 0;
  };
  struct Pointers {
    const T* keys;
    const T* values;
  };
  // a block of slots, and which of them anybody sees.
  struct Block {
    int64_t slot, first, last;
  };

  void carve(Carver& carver) {
    const int64_t rows = plan_.head_block * plan_.rows;
    queries_ = carver.take<R>(rows * plan_.width);
    turned_ = carver.take<Key>(rows * key_width_);
    weights_ = carver.take<R>(rows * kBlock);
    scores_ = carver.take<R>(plan_.rows * kBlock);
    rotated_ = carver.take<Key>(kBlock * key_width_);
    widened_ = carver.take<R>(kBlock * std::max(plan_.width, plan_.rows));
    combined_ = carver.take<R>(2 * call_.pairs);
    live_keys_ = carver.take<T>(kBlock * call_.dim);
    live_values_ = carver.take<T>(kBlock * call_.dim);
  }

  Item describe(int64_t index) const {
    Item item;
    item.range = index / plan_.head_blocks;
    const DecodeSequence *begin = plan_.sequences, *end = begin + call_.batch;
    const auto starts_later = [](int64_t at, const DecodeSequence& s) { return at < s.first_range; };
    item.sequence = std::upper_bound(begin, end, item.range, starts_later) - 1;
    const DecodeSequence& sequence = *item.sequence;
    item.b = item.sequence - begin;
    const int64_t range = item.range - sequence.first_range + sequence.begin / sequence.range_slots;
    item.first = std::max(sequence.begin, range * sequence.range_slots);
    item.last = std::min(sequence.end, (range + 1) * sequence.range_slots);
    item.begin = item.first / kBlock * kBlock;
    item.first_head = index % plan_.head_blocks * plan_.head_block;
    item.last_head = std::min(item.first_head + plan_.head_block, call_.kv_heads);
    return item;
  }

  const R* coarse_row(int64_t c) const {
    const int64_t offset = table_ * call_.coarse_strides[0] + c * call_.coarse_strides[1];
    return static_cast<const R*>(call_.coarse) + offset;
  }

  const R* fine_row(int64_t j) const {
    const int64_t offset = table_ * call_.fine_strides[0] + j * call_.fine_strides[1];
    return static_cast<const R*>(call_.fine) + offset;
  }

  R* queries(int64_t g) const { return queries_ + (g - item_.first_head) * plan_.rows * plan_.width; }
  Key* turned(int64_t g) const { return turned_ + (g - item_.first_head) * plan_.rows * key_width_; }

  RowState<R> state(int64_t g) const {
    const int64_t row = (item_.range * call_.kv_heads + g) * plan_.rows;
    return {static_cast<R*>(plan_.sums) + row * plan_.width, weights_ + (g - item_.first_head) * plan_.rows * kBlock,
            static_cast<R*>(plan_.maxima) + row};
  }

  // the row of the table for a position, the complex product of a coarse and a fine row.
  void combine(int64_t position) {
    const int64_t pairs = call_.pairs;
    const R* coarse = coarse_row(position / tile_);
    const R* fine = fine_row(position % tile_);
    for (int64_t i = 0; i < pairs; ++i) {
      combined_[i] = coarse[i] * fine[i] - coarse[pairs + i] * fine[pairs + i];
      combined_[pairs + i] = coarse[pairs + i] * fine[i] + coarse[i] * fine[pairs + i];
    }
  }

  // q' times the scale of the logits; a query before slot 0 sees nothing, and is not rotated.
  void start_head(int64_t g) {
    const int64_t* strides = call_.q_strides;
    for (int64_t l = 0; l < call_.length; ++l) {
      const int64_t position = item_.sequence->end - call_.length + l;
      const bool rotates = call_.rotate_q && position >= 0;
      const HeadShape shape{call_.dim, rotates ? call_.pairs : 0, plan_.width};
      if (rotates) combine(position);
      for (int64_t h = 0; h < plan_.group; ++h) {
        const T* q = static_cast<const T*>(call_.q) + item_.b * strides[0] + l * strides[1];
        R* query = queries(g) + (l * plan_.group + h) * plan_.width;
        rotate_row(q + (g * plan_.group + h) * strides[2], query, combined_, false, shape);
        for (int64_t d = 0; d < call_.dim; ++d) query[d] *= static_cast<R>(item_.sequence->scale);
      }
    }
    const RowState<R> rows = state(g);
    std::fill_n(rows.values, plan_.rows * plan_.width, R(0));
    std::fill_n(rows.weights, plan_.rows * kBlock, R(0));
    std::fill_n(rows.maxima, plan_.rows, kNothingSeen<R>);
  }

  void turn_queries(int64_t c) {
    const R* coarse = call_.rotate_k ? coarse_row(c) : nullptr;
    for (int64_t g = item_.first_head; g < item_.last_head; ++g) {
      Tiles::turn(queries(g), plan_.rows, coarse, turned(g), shape_);
    }
  }

  // where a block begins, no keys if its page does not exist.
  Pointers locate(const Item& item, int64_t slot) const {
    int64_t outer = item.b, inner = slot;
    if (call_.block_table.data) {
      outer = call_.block_table.at(item.b, slot / call_.page_size);
      inner = slot % call_.page_size;
      if (outer < 0 || outer >= call_.pages) return {nullptr, nullptr};
    }
    const auto at = [&](const Cache& cache) {
      return static_cast<const T*>(cache.data) + outer * cache.strides[0] + inner * cache.strides[1];
    };
    return {at(call_.keys), at(call_.values)};
  }

  // the same for a block to fetch, which past the end of this item is the next one's; none if there is none.
  Pointers look_ahead(int64_t slot) const {
    if (slot < item_.last) return locate(item_, slot);
    slot += next_.begin - ceil_div(item_.last, kBlock) * kBlock;
    if (slot >= next_.last) return {nullptr, nullptr};
    Pointers ahead = locate(next_, slot);
    if (!ahead.keys) return ahead;
    const int64_t heads = next_.first_head - item_.first_head;
    return {ahead.keys + heads * call_.keys.strides[2], ahead.values + heads * call_.values.strides[2]};
  }

  // dead slots may hold anything: zeros in their stead.
  const T* copy_live(const T* rows, int64_t& stride, T* copy) const {
    std::memset(static_cast<void*>(copy), 0, kBlock * call_.dim * sizeof(T));
    for (int64_t j = block_.first; j < block_.last; ++j) {
      std::memcpy(static_cast<void*>(copy + j * call_.dim), rows + j * stride, call_.dim * sizeof(T));
    }
    stride = call_.dim;
    return copy;
  }

  void hide() {
    for (int64_t l = 0; l < call_.length; ++l) {
      const Span span = visible_span(plan_, *item_.sequence, l);
      if (span.first <= block_.slot && block_.slot + kBlock <= span.last) continue;
      for (int64_t r = l * plan_.group; r < (l + 1) * plan_.group; ++r) {
        for (int64_t j = 0; j < kBlock; ++j) {
          const bool seen = span.first <= block_.slot + j && block_.slot + j < span.last;
          if (!seen) scores_[r * kBlock + j] = -std::numeric_limits<R>::infinity();
        }
      }
    }
  }

  void step(int64_t g, const Pointers& here, const Pointers& ahead) {
    int64_t key_stride = call_.keys.strides[1], value_stride = call_.values.strides[1];
    const T* keys = here.keys + g * call_.keys.strides[2];
    const T* values = here.values + g * call_.values.strides[2];
    const T* next_keys = ahead.keys + g * call_.keys.strides[2];
    const T* next_values = ahead.values + g * call_.values.strides[2];
    if (block_.last - block_.first < kBlock) {
      keys = copy_live(keys, key_stride, live_keys_);
      values = copy_live(values, value_stride, live_values_);
    }
    const R* fine = call_.rotate_k ? fine_row(block_.slot % tile_) : nullptr;
    const KeyBlock<T> block{keys, key_stride, next_keys, fine, fine ? call_.fine_strides[1] : 0};
    Tiles::score(turned(g), plan_.rows, block, rotated_, scores_, shape_);
    if (call_.softcap != 0.0) cap(scores_, plan_.rows, static_cast<R>(call_.softcap));
    hide();
    weigh(scores_, plan_.rows, state(g), plan_.width);
    Tiles::accumulate(values, value_stride, next_values, scores_, plan_.rows, widened_, state(g).values, shape_);
  }

  void finish_head(int64_t g) {
    R* total = static_cast<R*>(plan_.weights) + (item_.range * call_.kv_heads + g) * plan_.rows;
    const R* weights = state(g).weights;
    for (int64_t r = 0; r < plan_.rows; ++r) {
      total[r] = 0;
      for (int64_t j = 0; j < kBlock; ++j) total[r] += weights[r * kBlock + j];
    }
  }

  void poison() {
    for (int64_t g = item_.first_head; g < item_.last_head; ++g) {
      std::fill_n(state(g).weights, plan_.rows * kBlock, std::numeric_limits<R>::quiet_NaN());
      finish_head(g);
    }
  }

  const DecodePlan& plan_;
  const DecodeCall& call_;
  const HeadShape shape_;
  const int64_t key_width_, tile_;
  Item item_, next_;
  int64_t table_ = 0;
  Block block_ = {};
  R *queries_, *weights_, *scores_, *widened_, *combined_;
  Key *turned_, *rotated_;
  T *live_keys_, *live_values_;
};

}  // namespace clex
