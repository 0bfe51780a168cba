// The CPU kernels whose threads share a plan, built with ThreadSanitizer by thread.py: two callers at a time, each with
// four threads of its own, as torch's parallel_for would lend them, decode over a cache, project and rotate, and rotate
// back with dfreq. Bits must be those of one thread. Exit status 1 if they differ, ThreadSanitizer's own, 66, for a race.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "decode.h"
#include "qkv_rotary.h"
#include "rotary.h"

namespace {

using Floats = std::vector<float>;

constexpr int kCallers = 2, kHelpers = 4, kRounds = 3;

constexpr int64_t kBatch = 2, kLength = 3, kHeads = 4, kKvHeads = 2, kDim = 32, kPairs = 16, kSlots = 1024, kTile = 64;
constexpr int64_t kTokens = kBatch * kLength, kRow = 2 * kPairs, kTiles = kSlots / kTile;

Floats noise(int64_t count, uint64_t seed) {
  Floats values(count);
  for (float& value : values) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(seed >> 40) * 0x1p-23f - 1.0f;
  }
  return values;
}

// Rows [count, 2, R] of cosines and sines of positions 0, spacing, ...
Floats table(int64_t count, int64_t spacing) {
  Floats rows(count * kRow);
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < kPairs; ++i) {
      const double angle = static_cast<double>(row * spacing) * std::pow(10.0, -0.2 * i);
      rows[row * kRow + i] = static_cast<float>(std::cos(angle));
      rows[row * kRow + kPairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  return rows;
}

const Floats coarse = table(kTiles, kTile), fine = table(kTile, 1);

template <class Call>
void set_tables(Call& call) {
  call.pairs = kPairs;
  call.tables = 1;
  call.tiles = kTiles;
  call.tile = kTile;
  call.coarse = coarse.data();
  call.fine = fine.data();
  call.coarse_strides[0] = kTiles * kRow;
  call.fine_strides[0] = kTile * kRow;
  call.coarse_strides[1] = call.fine_strides[1] = kRow;
}

// `work` by `helpers` threads at once, the caller one of them.
void together(int helpers, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int helper = 1; helper < helpers; ++helper) threads.emplace_back(work, helper);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

// [0, count) in parts, one for each helper.
void share_out(int helpers, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  together(helpers, [&](int helper) { work(count * helper / helpers, count * (helper + 1) / helpers); });
}

Floats decode(int helpers) {
  static const Floats q = noise(kTokens * kHeads * kDim, 1), k = noise(kBatch * kSlots * kKvHeads * kDim, 2);
  static const Floats v = noise(k.size(), 3);
  static const int64_t ends[kBatch] = {kSlots, kSlots - 300};
  Floats out(q.size()), lse(kTokens * kHeads);
  clex::DecodeCall call;
  call.batch = kBatch;
  call.length = kLength;
  call.heads = kHeads;
  call.kv_heads = kKvHeads;
  call.dim = kDim;
  call.slots = kSlots;
  call.q = q.data();
  std::copy_n(std::vector<int64_t>{kLength * kHeads * kDim, kHeads * kDim, kDim}.begin(), 3, call.q_strides);
  for (clex::Cache* cache : {&call.keys, &call.values}) {
    cache->data = (cache == &call.keys ? k : v).data();
    std::copy_n(std::vector<int64_t>{kSlots * kKvHeads * kDim, kKvHeads * kDim, kDim}.begin(), 3, cache->strides);
  }
  set_tables(call);
  call.rotate_q = call.rotate_k = true;
  call.kv_end = {ends, true, {1, 0}};
  call.scale = 0.2;
  call.out = out.data();
  call.lse = lse.data();
  thread_local clex::Workspace workspaces[2];
  clex::DecodePlan plan;
  clex::plan_decode(call, workspaces, plan);
  together(helpers, [&](int) { clex::decode_items(plan); });
  share_out(helpers, kBatch * kKvHeads, [&](int64_t begin, int64_t end) { clex::merge_decode(plan, begin, end); });
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}

Floats project(int helpers) {
  constexpr int64_t kChannels = 200, kHeadsAll = kHeads + 2 * kKvHeads;
  static const Floats x = noise(kTokens * kChannels, 4), weight = noise(kHeadsAll * kDim * kChannels, 5);
  Floats out(kTokens * kHeadsAll * kDim);
  clex::QkvRotaryCall call;
  call.rotary.batch = kBatch;
  call.rotary.length = kLength;
  call.rotary.dim = kDim;
  set_tables(call.rotary);
  call.channels = kChannels;
  call.x = x.data();
  std::copy_n(std::vector<int64_t>{kLength * kChannels, kChannels, 1}.begin(), 3, call.x_strides);
  for (int64_t i = 0, head = 0; i < 3; head += call.projections[i++].heads) {
    clex::Projection& projection = call.projections[i];
    projection.heads = i == 0 ? kHeads : kKvHeads;
    projection.weight = weight.data() + head * kDim * kChannels;
    projection.weight_stride = kChannels;
    projection.rotates = i < 2;
    projection.out = {out.data() + head * kDim, kHeadsAll * kDim};
  }
  thread_local clex::Workspace workspace;
  clex::QkvRotaryPlan plan;
  clex::plan_qkv_rotary(call, workspace, plan);
  together(helpers, [&](int) { clex::qkv_rotary_items(plan); });
  return out;
}

Floats rotate_back(int helpers) {
  constexpr int64_t kLong = 300;
  static const Floats dy = noise(kBatch * kLong * kHeads * kDim, 6), y = noise(dy.size(), 7);
  Floats out(dy.size());
  clex::RotaryCall call;
  call.batch = kBatch;
  call.length = kLong;
  call.dim = kDim;
  call.conjugate = true;
  set_tables(call);
  clex::RotaryTensor& tensor = call.tensors[0];
  tensor.heads = kHeads;
  tensor.source = dy.data();
  tensor.target = out.data();
  tensor.rotated = y.data();
  for (int64_t* strides : {tensor.source_strides, tensor.target_strides, tensor.rotated_strides}) {
    std::copy_n(std::vector<int64_t>{kLong * kHeads * kDim, kHeads * kDim, kDim}.begin(), 3, strides);
  }
  const int64_t chunks = clex::rotary_bwd_chunks(call);
  std::vector<double> partials(chunks * kPairs), dfreq(kPairs);
  share_out(helpers, chunks,
            [&](int64_t begin, int64_t end) { clex::rotary_bwd(call, begin, end, partials.data()); });
  clex::rotary_bwd_reduce(call, partials.data(), dfreq.data());
  out.insert(out.end(), dfreq.begin(), dfreq.end());
  return out;
}

}  // namespace

int main() {
  std::atomic<int> failures = 0;
  Floats (*const kernels[])(int) = {decode, project, rotate_back};
  std::vector<Floats> expected;
  for (const auto kernel : kernels) expected.push_back(kernel(1));
  for (const Floats& values : expected) {
    const bool is_number = std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
    const bool is_something = std::any_of(values.begin(), values.end(), [](float value) { return value != 0; });
    failures += !is_number + !is_something;
  }
  together(kCallers, [&](int) {
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < expected.size(); ++i) failures += kernels[i](kHelpers) != expected[i];
    }
  });
  std::printf("%d callers of %d threads, %d failures\n", kCallers, kHelpers, failures.load());
  return failures == 0 ? 0 : 1;
}
