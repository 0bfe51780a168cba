// Attention of a few new tokens over a cache of raw keys, which are rotated on load; torch-free.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "elements.h"
#include "integers.h"

namespace clex {

// keys of a block: pages and tiles hold whole blocks.
constexpr int64_t kBlock = 16;

// Keys or values [B, S, G, D], or [pages, P, G, D]; strides over B or pages, S or P, and G; unit stride in D.
struct Cache {
  const void* data = nullptr;
  int64_t strides[3] = {};
};

struct DecodeCall {
  Element element = Element::fp32;
  int64_t batch = 0, length = 0, heads = 0, kv_heads = 0, dim = 0, pairs = 0;
  int64_t slots = 0;  // of a sequence
  const void* q = nullptr;
  int64_t q_strides[3] = {};
  Cache keys, values;
  Integers block_table;  // [B, S / P], none: the cache is contiguous
  int64_t page_size = 0, pages = 0;

  // coarse [T, C, 2, R] and fine [T, F, 2, R], fp32 (fp64 for fp64 elements), strides over T and C or F.
  const void* coarse = nullptr;
  const void* fine = nullptr;
  int64_t coarse_strides[2] = {};
  int64_t fine_strides[2] = {};
  int64_t tables = 0, tiles = 0, tile = 0;
  const int64_t* index = nullptr;  // [B]
  int64_t index_stride = 0;
  int64_t train_length = 0;  // 0: tables are not chosen by length
  bool rotate_q = false, rotate_k = false;

  Integers kv_end, kv_start, lengths;  // [B], the latter two optional
  double scale = 1.0;
  int64_t window = 0;     // 0: none
  double softcap = 0.0;   // 0: none
  double log_base = 0.0;  // 0: none
  bool log_clamped = false;

  void* out = nullptr;  // [B, L, H, D], contiguous
  void* lse = nullptr;  // [B, H, L], contiguous; or none
};

// Memory aligned for vectors, which grows and is kept.
class Workspace {
 public:
  std::byte* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      // also where there is no more.
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte[], Delete> memory_;
  size_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out arrays of one allocation; without memory it only counts the bytes.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    std::byte* array = memory_ ? memory_ + bytes : nullptr;
    bytes += ceil_div(count * sizeof(T), 64) * 64;
    return reinterpret_cast<T*>(array);
  }
  size_t bytes = 0;

 private:
  std::byte* memory_;
};

// What a sequence's rows see together, slots [begin, end), in ranges that end at multiples of range_slots.
struct DecodeSequence {
  int64_t begin, end, range_slots;
  int64_t ranges, first_range;  // how many, and the first among those of all sequences
  int64_t table;
  double scale;
  bool broken;  // its table does not exist or is too short
};

// A call cut into items, each a range of a sequence's slots for a block of KV heads. Where it is cut depends on the
// sequence alone, never on others, nor on threads: so its bits don't either.
struct DecodePlan {
  const DecodeCall* call = nullptr;
  DecodeSequence* sequences = nullptr;  // [B]
  int64_t ranges = 0, head_block = 0, head_blocks = 0, items = 0;
  int64_t group = 0, rows = 0, width = 0;  // H / G, L H / G, D in whole vectors
  int64_t tile = 0, window = 0;            // F, and a window that hides nothing if there is none
  void* sums = nullptr;                    // [ranges, G, rows, width] of weighted values,
  void* weights = nullptr;                 // [ranges, G, rows] of weights,
  void* maxima = nullptr;                  // [ranges, G, rows] and the logits that both are relative to
  std::atomic<int64_t> next_item = 0;
};

// Reads all bounds, once: whoever changes them meanwhile changes nothing here. The plan's arrays lie in the workspaces.
void plan_decode(const DecodeCall& call, Workspace (&workspaces)[2], DecodePlan& plan);

// Works on items until none are left, beside other threads that do the same.
void decode_items(DecodePlan& plan);

// Adds up the ranges of the KV heads [begin, end) of the B G and writes out and lse.
void merge_decode(const DecodePlan& plan, int64_t begin, int64_t end);

}  // namespace clex
