// Flash decoding: with a key block's logits s, a row's running maximum m, sum of weights w and of weighted values a,
//
//   m' = max(m, s)    w = e^(m - m') w + sum e^(s - m')    a = e^(m - m') a + sum e^(s - m') v    out = a / w
//
// and lse = m + ln w. Ranges of slots sum up by themselves, and merge by the same rule.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "decode_native.h"
#include "decode_tiles.h"

namespace clex {
namespace {

constexpr int64_t kRangeSlots = 1024;
constexpr int64_t kMinRanges = 16;
// rows of an item that takes several KV heads: their queries and sums should stay in the L2 cache.
constexpr int64_t kItemRows = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out arrays of one allocation; without memory it only counts the bytes.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  template <class U>
  U* take(int64_t count) {
    std::byte* array = memory_ ? memory_ + bytes : nullptr;
    bytes += ceil_div(count * sizeof(U), 64) * 64;
    return reinterpret_cast<U*>(array);
  }
  size_t bytes = 0;

 private:
  std::byte* memory_;
};

int64_t tile_of(const DecodeCall& call) { return call.rotate_q || call.rotate_k ? call.tile : 64; }

int64_t choose_table(const DecodeCall& call, int64_t b, int64_t length) {
  if (call.index) return call.index[b * call.index_stride];
  if (call.train_length) return std::clamp<int64_t>((length - 1) / call.train_length, 0, call.tables - 1);
  return call.tables == 1 ? 0 : b;
}

double scale_of(const DecodeCall& call, int64_t length) {
  if (call.log_base == 0.0) return call.scale;
  const double factor = std::log(static_cast<double>(std::max<int64_t>(length, 1))) / call.log_base;
  return call.scale * (call.log_clamped ? std::max(factor, 1.0) : factor);
}

DecodeSequence plan_sequence(const DecodeCall& call, int64_t b) {
  const int64_t given_end = call.kv_end.at(b), given_start = call.kv_start.data ? call.kv_start.at(b) : 0;
  const int64_t length = call.lengths.data ? call.lengths.at(b) : std::max<int64_t>(given_end - given_start, 0);
  DecodeSequence sequence;
  sequence.end = std::clamp<int64_t>(given_end, 0, call.slots);
  sequence.begin = std::clamp<int64_t>(given_start, 0, call.slots);
  if (call.window) {
    const int64_t window = std::min(call.window, call.slots + call.length);
    sequence.begin = std::max(sequence.begin, sequence.end - call.length - window + 1);
  }
  const int64_t tile = tile_of(call);
  const int64_t tiles = ceil_div(sequence.end, tile) - sequence.begin / tile;
  const int64_t most = std::max<int64_t>(kRangeSlots / tile, 1);
  sequence.range_slots = tile * std::clamp<int64_t>(ceil_div(tiles, kMinRanges), 1, most);
  sequence.table = choose_table(call, b, length);
  sequence.scale = scale_of(call, length);
  const bool exists = sequence.table >= 0 && sequence.table < call.tables;
  sequence.broken = (call.rotate_q || call.rotate_k) && !(exists && sequence.end <= call.tiles * call.tile);
  return sequence;
}

bool sees_nothing(const DecodeSequence& sequence) { return sequence.begin >= sequence.end; }

int64_t count_ranges(const DecodeSequence& sequence) {
  if (sequence.broken || sees_nothing(sequence)) return 0;
  return ceil_div(sequence.end, sequence.range_slots) - sequence.begin / sequence.range_slots;
}

// slots [first, last) that a row's query sees.
struct Span {
  int64_t first, last;
};

Span visible_span(const DecodeCall& call, const DecodeSequence& sequence, int64_t l) {
  const int64_t position = sequence.end - call.length + l;
  const int64_t window = call.window ? std::min(call.window, call.slots + call.length) : position + 1;
  return {std::max(sequence.begin, position - window + 1), position + 1};
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
        key_width_(Tiles::key_width(shape_)) {
    Carver counter(nullptr);
    carve(counter);
    Carver carver(workspace.reserve(counter.bytes));
    carve(carver);
    // beyond D zeros stay.
    std::memset(static_cast<void*>(queries_), 0, plan.head_block * plan.rows * plan.width * sizeof(R));
    std::memset(static_cast<void*>(turned_), 0, plan.head_block * plan.rows * key_width_ * sizeof(Key));
    std::memset(static_cast<void*>(rotated_), 0, kBlock * key_width_ * sizeof(Key));
  }

  void run(int64_t item) {
    select(item);
    for (int64_t g = first_head_; g < last_head_; ++g) start_head(g);
    const int64_t first = std::max(sequence_->begin, range_ * sequence_->range_slots);
    const int64_t last = std::min(sequence_->end, (range_ + 1) * sequence_->range_slots);
    Pointers here = locate(first / kBlock * kBlock);
    for (int64_t slot = first / kBlock * kBlock; slot < last; slot += kBlock) {
      if (!here.keys) return poison();
      const Pointers next = slot + kBlock < last ? locate(slot + kBlock) : here;
      if (slot == first / kBlock * kBlock || slot % tile_ == 0) turn_queries(slot / tile_);
      block_ = {slot, std::max(first, slot) - slot, std::min(last, slot + kBlock) - slot};
      for (int64_t g = first_head_; g < last_head_; ++g) {
        const bool more = g + 1 < last_head_;
        step(g, here, more ? here : next.keys ? next : here, more ? g + 1 : first_head_);
      }
      here = next;
    }
    for (int64_t g = first_head_; g < last_head_; ++g) finish_head(g);
  }

 private:
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

  void select(int64_t item) {
    const int64_t range = item / plan_.head_blocks;
    const DecodeSequence *begin = plan_.sequences, *end = begin + call_.batch;
    const auto starts_later = [](int64_t at, const DecodeSequence& s) { return at < s.first_range; };
    sequence_ = std::upper_bound(begin, end, range, starts_later) - 1;
    b_ = sequence_ - plan_.sequences;
    slot_of_range_ = range;
    range_ = range - sequence_->first_range + sequence_->begin / sequence_->range_slots;
    first_head_ = item % plan_.head_blocks * plan_.head_block;
    last_head_ = std::min(first_head_ + plan_.head_block, call_.kv_heads);
    tile_ = tile_of(call_);
    table_ = call_.rotate_q || call_.rotate_k ? sequence_->table : 0;
  }

  const R* coarse_row(int64_t c) const {
    const int64_t offset = table_ * call_.coarse_strides[0] + c * call_.coarse_strides[1];
    return static_cast<const R*>(call_.coarse) + offset;
  }

  const R* fine_row(int64_t j) const {
    const int64_t offset = table_ * call_.fine_strides[0] + j * call_.fine_strides[1];
    return static_cast<const R*>(call_.fine) + offset;
  }

  R* queries(int64_t g) const { return queries_ + (g - first_head_) * plan_.rows * plan_.width; }
  Key* turned(int64_t g) const { return turned_ + (g - first_head_) * plan_.rows * key_width_; }

  RowState<R> state(int64_t g) const {
    const int64_t row = (slot_of_range_ * call_.kv_heads + g) * plan_.rows;
    return {static_cast<R*>(plan_.sums) + row * plan_.width, weights_ + (g - first_head_) * plan_.rows * kBlock,
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
      const int64_t position = sequence_->end - call_.length + l;
      const bool rotates = call_.rotate_q && position >= 0;
      const HeadShape shape{call_.dim, rotates ? call_.pairs : 0, plan_.width};
      if (rotates) combine(position);
      for (int64_t h = 0; h < plan_.group; ++h) {
        const T* q = static_cast<const T*>(call_.q) + b_ * strides[0] + l * strides[1];
        R* query = queries(g) + (l * plan_.group + h) * plan_.width;
        rotate_row(q + (g * plan_.group + h) * strides[2], query, combined_, false, shape);
        for (int64_t d = 0; d < call_.dim; ++d) query[d] *= static_cast<R>(sequence_->scale);
      }
    }
    const RowState<R> rows = state(g);
    std::fill_n(rows.values, plan_.rows * plan_.width, R(0));
    std::fill_n(rows.weights, plan_.rows * kBlock, R(0));
    std::fill_n(rows.maxima, plan_.rows, kNothingSeen<R>);
  }

  void turn_queries(int64_t c) {
    const R* coarse = call_.rotate_k ? coarse_row(c) : nullptr;
    for (int64_t g = first_head_; g < last_head_; ++g) {
      Tiles::turn(queries(g), plan_.rows, coarse, turned(g), shape_);
    }
  }

  // where a block begins, no keys if its page does not exist.
  Pointers locate(int64_t slot) const {
    int64_t outer = b_, inner = slot;
    if (call_.block_table.data) {
      outer = call_.block_table.at(b_, slot / call_.page_size);
      inner = slot % call_.page_size;
      if (outer < 0 || outer >= call_.pages) return {nullptr, nullptr};
    }
    const auto at = [&](const Cache& cache) {
      return static_cast<const T*>(cache.data) + outer * cache.strides[0] + inner * cache.strides[1];
    };
    return {at(call_.keys), at(call_.values)};
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
      const Span span = visible_span(call_, *sequence_, l);
      if (span.first <= block_.slot && block_.slot + kBlock <= span.last) continue;
      for (int64_t r = l * plan_.group; r < (l + 1) * plan_.group; ++r) {
        for (int64_t j = 0; j < kBlock; ++j) {
          const bool seen = span.first <= block_.slot + j && block_.slot + j < span.last;
          if (!seen) scores_[r * kBlock + j] = -std::numeric_limits<R>::infinity();
        }
      }
    }
  }

  void step(int64_t g, const Pointers& here, const Pointers& next, int64_t next_head) {
    int64_t key_stride = call_.keys.strides[1], value_stride = call_.values.strides[1];
    const T* keys = here.keys + g * call_.keys.strides[2];
    const T* values = here.values + g * call_.values.strides[2];
    const T* next_keys = next.keys + next_head * call_.keys.strides[2];
    const T* next_values = next.values + next_head * call_.values.strides[2];
    if (block_.last - block_.first < kBlock) {
      keys = copy_live(keys, key_stride, live_keys_);
      values = copy_live(values, value_stride, live_values_);
    }
    const R* fine = call_.rotate_k ? fine_row(block_.slot % tile_) : nullptr;
    Tiles::rotate_keys(keys, key_stride, next_keys, fine, call_.fine_strides[1], rotated_, shape_);
    Tiles::score(turned(g), plan_.rows, rotated_, key_width_, scores_);
    if (call_.softcap != 0.0) cap(scores_, plan_.rows, static_cast<R>(call_.softcap));
    hide();
    weigh(scores_, plan_.rows, state(g), plan_.width);
    Tiles::accumulate(values, value_stride, next_values, scores_, plan_.rows, widened_, state(g).values, shape_);
  }

  void finish_head(int64_t g) {
    R* total = static_cast<R*>(plan_.weights) + (slot_of_range_ * call_.kv_heads + g) * plan_.rows;
    const R* weights = state(g).weights;
    for (int64_t r = 0; r < plan_.rows; ++r) {
      total[r] = 0;
      for (int64_t j = 0; j < kBlock; ++j) total[r] += weights[r * kBlock + j];
    }
  }

  void poison() {
    for (int64_t g = first_head_; g < last_head_; ++g) {
      std::fill_n(state(g).weights, plan_.rows * kBlock, std::numeric_limits<R>::quiet_NaN());
      finish_head(g);
    }
  }

  const DecodePlan& plan_;
  const DecodeCall& call_;
  const HeadShape shape_;
  const int64_t key_width_;
  const DecodeSequence* sequence_ = nullptr;
  int64_t b_ = 0, range_ = 0, slot_of_range_ = 0, first_head_ = 0, last_head_ = 0, tile_ = 0, table_ = 0;
  Block block_ = {};
  R *queries_, *weights_, *scores_, *widened_, *combined_;
  Key *turned_, *rotated_;
  T *live_keys_, *live_values_;
};

// Adds up a row's ranges into values [width] and returns its lse.
template <class R>
CLEX_INLINE R merge_row(const DecodePlan& plan, int64_t first_range, int64_t ranges, int64_t g, int64_t r, R* values) {
  const auto row = [&](int64_t range) { return ((first_range + range) * plan.call->kv_heads + g) * plan.rows + r; };
  const R* sums = static_cast<const R*>(plan.sums);
  const R* weights = static_cast<const R*>(plan.weights);
  const R* maxima = static_cast<const R*>(plan.maxima);
  R top = kNothingSeen<R>, total = 0;
  for (int64_t range = 0; range < ranges; ++range) top = std::max(top, maxima[row(range)]);
  std::fill_n(values, plan.width, R(0));
  for (int64_t range = 0; range < ranges; ++range) {
    const R share = weight_of(maxima[row(range)] - top);
    const R* summed = sums + row(range) * plan.width;
    total += share * weights[row(range)];
    for (int64_t d = 0; d < plan.width; ++d) values[d] += share * summed[d];
  }
  if (total == 0) return -std::numeric_limits<R>::infinity();
  for (int64_t d = 0; d < plan.width; ++d) values[d] /= total;
  return top + std::log(total);
}

template <class T>
void merge_heads(const DecodePlan& plan, int64_t begin, int64_t end) {
  using R = Real<T>;
  const DecodeCall& call = *plan.call;
  thread_local Workspace workspace;
  R* values = reinterpret_cast<R*>(workspace.reserve(plan.width * sizeof(R)));
  for (int64_t head = begin; head < end; ++head) {
    const int64_t b = head / call.kv_heads, g = head % call.kv_heads;
    const DecodeSequence& sequence = plan.sequences[b];
    const bool broken = sequence.broken && !sees_nothing(sequence);
    for (int64_t r = 0; r < plan.rows; ++r) {
      R lse = merge_row(plan, sequence.first_range, count_ranges(sequence), g, r, values);
      if (broken) std::fill_n(values, plan.width, lse = std::numeric_limits<R>::quiet_NaN());
      const int64_t l = r / plan.group, h = g * plan.group + r % plan.group;
      T* out = static_cast<T*>(call.out) + ((b * call.length + l) * call.heads + h) * call.dim;
      for (int64_t d = 0; d < call.dim; ++d) narrow(values[d], out[d]);
      if (call.lse) static_cast<R*>(call.lse)[(b * call.heads + h) * call.length + l] = lse;
    }
  }
}

template <class T, class Tiles>
void work_by(DecodePlan& plan) {
  thread_local Workspace workspace;
  ItemWorker<T, Tiles> worker(plan, workspace);
  for (int64_t item; (item = plan.next_item++) < plan.items;) worker.run(item);
}

template <class T>
void work(DecodePlan& plan) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<T, double>) {
    if (has_half_rows()) return work_by<T, NativeTiles<T>>(plan);
  }
#endif
  work_by<T, PortableTiles<T>>(plan);
}

int64_t real_size(const DecodeCall& call) { return call.element == Element::fp64 ? 8 : 4; }

}  // namespace

void plan_decode(const DecodeCall& call, Workspace& workspace, DecodePlan& plan) {
  plan.call = &call;
  plan.group = call.heads / call.kv_heads;
  plan.rows = call.length * plan.group;
  plan.width = ceil_div(call.dim, 32) * 32;
  // where a slot's heads lie side by side, an item takes them together, to read whole rows.
  const bool token_major = call.keys.strides[2] < call.keys.strides[1];
  plan.head_block = token_major ? std::clamp<int64_t>(kItemRows / plan.rows, 1, call.kv_heads) : 1;
  plan.head_blocks = ceil_div(call.kv_heads, plan.head_block);

  int64_t most_ranges = 0;
  plan.ranges = 0;
  for (int64_t b = 0; b < call.batch; ++b) most_ranges += count_ranges(plan_sequence(call, b));
  const auto carve = [&](Carver carver) {
    const int64_t rows = most_ranges * call.kv_heads * plan.rows, size = real_size(call);
    plan.sequences = carver.take<DecodeSequence>(call.batch);
    plan.sums = carver.take<std::byte>(rows * plan.width * size);
    plan.weights = carver.take<std::byte>(rows * size);
    plan.maxima = carver.take<std::byte>(rows * size);
    return carver.bytes;
  };
  carve(Carver(workspace.reserve(carve(Carver(nullptr)))));
  for (int64_t b = 0; b < call.batch; ++b) {
    plan.sequences[b] = plan_sequence(call, b);
    plan.sequences[b].first_range = plan.ranges;
    plan.ranges += count_ranges(plan.sequences[b]);
  }
  plan.items = plan.ranges * plan.head_blocks;
  plan.next_item = 0;
}

void decode_items(DecodePlan& plan) {
  switch (plan.call->element) {
    case Element::fp32: return work<float>(plan);
    case Element::fp16: return work<Fp16>(plan);
    case Element::bf16: return work<Bf16>(plan);
    case Element::fp64: return work<double>(plan);
  }
}

void merge_decode(const DecodePlan& plan, int64_t begin, int64_t end) {
  switch (plan.call->element) {
    case Element::fp32: return merge_heads<float>(plan, begin, end);
    case Element::fp16: return merge_heads<Fp16>(plan, begin, end);
    case Element::bf16: return merge_heads<Bf16>(plan, begin, end);
    case Element::fp64: return merge_heads<double>(plan, begin, end);
  }
}

}  // namespace clex
