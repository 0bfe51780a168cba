// Projects few tokens to q, k and v, and rotates q and k, in one pass over the weights; torch-free.
#pragma once

#include <atomic>
#include <cstdint>

#include "decode.h"
#include "rotary.h"

namespace clex {

// An output [B L, heads, D], its strides over heads and D those of a contiguous tensor.
struct ProjectionTarget {
  void* data = nullptr;
  int64_t stride = 0;  // over tokens
};

// The projection to q, k or v.
struct Projection {
  int64_t heads = 0;
  const void* weight = nullptr;  // [heads D, C], unit stride in C
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [heads D], or none
  int64_t bias_stride = 0;
  bool rotates = false;
  ProjectionTarget out;
  ProjectionTarget raw;  // what has not been rotated, where it is wanted as well
};

struct QkvRotaryCall {
  RotaryCall rotary;  // B, L, D and the tables; no tensors
  Projection projections[3];
  int64_t channels = 0;  // C
  const void* x = nullptr;
  int64_t x_strides[3] = {};
};

// A call cut into blocks of four rows of the weights, and these into items. Every output is a product of its own, added
// up in an order that depends on C alone: its bits depend neither on other tokens nor on threads.
struct QkvRotaryPlan {
  const QkvRotaryCall* call = nullptr;
  int64_t width = 0;          // C in whole vectors
  int64_t blocks[3] = {};     // of a head of q, k and v
  int64_t all_blocks = 0, item_blocks = 0, items = 0;
  void* x = nullptr;     // [B L, width], filled up with zeros, of the type that products take
  void* rows = nullptr;  // [B L, 2, R], cosines and sines of each token
  std::atomic<int64_t> next_item = 0;
};

// The plan's arrays lie in the workspace.
void plan_qkv_rotary(const QkvRotaryCall& call, Workspace& workspace, QkvRotaryPlan& plan);

// Works on items until none are left, beside other threads that do the same.
void qkv_rotary_items(QkvRotaryPlan& plan);

}  // namespace clex
