// Flash decoding: with a key block's logits s, a row's running maximum m, sum of weights w and of weighted values a,
//
//   m' = max(m, s)    w = e^(m - m') w + sum e^(s - m')    a = e^(m - m') a + sum e^(s - m') v    out = a / w
//
// and lse = m + ln w. Ranges of slots sum up by themselves, and merge by the same rule.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "decode_items.h"
#include "decode_native.h"
#include "decode_tiles.h"

namespace clex {
namespace {

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
    for (int64_t r = 0; r < plan.rows; ++r) {
      R lse = merge_row(plan, sequence.first_range, sequence.ranges, g, r, values);
      const int64_t l = r / plan.group, h = g * plan.group + r % plan.group;
      const Span span = visible_span(plan, sequence, l);
      if (sequence.broken && span.first < span.last) {
        std::fill_n(values, plan.width, lse = std::numeric_limits<R>::quiet_NaN());
      }
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
  int64_t item = plan.next_item++;
  while (item < plan.items) {
    const int64_t upcoming = plan.next_item++;
    worker.run(item, upcoming);
    item = upcoming;
  }
}

template <class T>
void work(DecodePlan& plan) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<T, double>) {
    if (has_avx512_bf16()) return work_by<T, NativeTiles<T>>(plan);
  }
#endif
  work_by<T, PortableTiles<T>>(plan);
}

}  // namespace

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
