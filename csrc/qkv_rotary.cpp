// [q, k, v] = x W^T + bias, q and k rotated: y0 = x0 cos - x1 sin, y1 = x1 cos + x0 sin for the rows p and R + p of a
// head, of which both products are at hand at once. Rounded once, when all is done.
#include "qkv_rotary.h"

#include <algorithm>
#include <type_traits>

#include "decode_native.h"
#include "decode_tiles.h"
#include "elements.h"
#include "isa.h"
#include "rotary_rows.h"

namespace clex {
namespace {

constexpr int64_t kRows = 4;

// what a thread takes at once, about.
constexpr int64_t kItemBytes = 64 << 10;

template <class T>
struct RowPointers {
  const T* row[kRows];
  RowPointers at(int64_t c) const { return {row[0] + c, row[1] + c, row[2] + c, row[3] + c}; }
};

// Rows of a head: pairs (p, R + p) and (p + 1, R + p + 1), or four rows that are not rotated. Where fewer are left, the
// last come twice.
struct RowBlock {
  const Projection* projection;
  int64_t head;
  int64_t rows[kRows];
  bool rotates;
};

int64_t pairs_of(const QkvRotaryCall& call, const Projection& projection) {
  return projection.rotates ? call.rotary.pairs : 0;
}

RowBlock block_at(const QkvRotaryPlan& plan, int64_t index) {
  const QkvRotaryCall& call = *plan.call;
  int i = 0;
  for (; index >= call.projections[i].heads * plan.blocks[i]; ++i) index -= call.projections[i].heads * plan.blocks[i];
  RowBlock block{&call.projections[i], index / plan.blocks[i], {}, false};
  const int64_t dim = call.rotary.dim, pairs = pairs_of(call, *block.projection), j = index % plan.blocks[i];
  block.rotates = 2 * j < pairs;
  if (block.rotates) {
    const int64_t first = 2 * j, second = std::min(first + 1, pairs - 1);
    const int64_t rows[kRows] = {first, pairs + first, second, pairs + second};
    std::copy_n(rows, kRows, block.rows);
  } else {
    const int64_t first = 2 * pairs + kRows * (j - ceil_div(pairs, 2));
    for (int64_t r = 0; r < kRows; ++r) block.rows[r] = std::min(first + r, dim - 1);
  }
  return block;
}

template <class T>
RowPointers<T> pointers_of(const QkvRotaryCall& call, const RowBlock& block) {
  const Projection& projection = *block.projection;
  RowPointers<T> pointers;
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t row = block.head * call.rotary.dim + block.rows[r];
    pointers.row[r] = static_cast<const T*>(projection.weight) + row * projection.weight_stride;
  }
  return pointers;
}

// sums [kTokens, 4, 16] += 16 channels of x [kTokens, width] times those of four rows.
template <class T, int kTokens>
CLEX_INLINE void add_products(const RowPointers<T>& rows, const Real<T>* x, int64_t width,
                              Real<T> (&sums)[kTokens][kRows][16]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const Real<T> weight = widen(rows.row[r][i]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[t][r][i] += weight * x[t * width + i];
    }
  }
}

// products [kTokens, 4] of x [kTokens, width] and four rows; meanwhile those that come next are brought nearer.
template <class T, int kTokens>
CLEX_INLINE void multiply_tokens(const RowPointers<T>& rows, const RowPointers<T>* next, const Real<T>* x,
                                 int64_t width, int64_t channels, Real<T>* products) {
  Real<T> sums[kTokens][kRows][16] = {};
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    if (next) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) prefetch_row(next->row[r] + c, 16);
    }
    add_products<T, kTokens>(rows.at(c), x + c, width, sums);
  }
  if (c < channels) {
    T rest[kRows][16] = {};
    for (int r = 0; r < kRows; ++r) std::copy_n(rows.row[r] + c, channels - c, rest[r]);
    add_products<T, kTokens>({rest[0], rest[1], rest[2], rest[3]}, x + c, width, sums);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) products[t * kRows + r] = sum_lanes(sums[t][r]);
  }
}

// products [tokens, 4] of x [tokens, width]
template <class T>
CLEX_INLINE void multiply_body(const RowPointers<T>& rows, const RowPointers<T>* next, const Real<T>* x,
                               int64_t tokens, int64_t width, int64_t channels, Real<T>* products) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4, next = nullptr) {
    multiply_tokens<T, 4>(rows, next, x + t * width, width, channels, products + t * kRows);
  }
  for (; t + 2 <= tokens; t += 2, next = nullptr) {
    multiply_tokens<T, 2>(rows, next, x + t * width, width, channels, products + t * kRows);
  }
  if (t < tokens) multiply_tokens<T, 1>(rows, next, x + t * width, width, channels, products + t * kRows);
}

CLEX_MULTIVERSION(multiply,
                  (const RowPointers<T>& rows, const RowPointers<T>* next, const Real<T>* x, int64_t tokens,
                   int64_t width, int64_t channels, Real<T>* products),
                  (rows, next, x, tokens, width, channels, products))

template <class T>
struct PortableProducts {
  using Input = Real<T>;
  static constexpr auto multiply = clex::multiply<T>;
};

#if defined(__x86_64__)
// As add_products by a vector of each row, of which `count` channels exist: bf16 in pairs, fp16 by its conversion. For
// fp32 compilers get as far.
template <class T, int kTokens, class Input>
CLEX_NATIVE void add_products_native(const RowPointers<T>& rows, int64_t count, const Input* x, int64_t width,
                                     __m512 (&sums)[16]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512 weights;
    if constexpr (std::is_same_v<T, Bf16>) {
      weights = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes32(count), rows.row[r]));
    } else {
      weights = load_lanes(rows.row[r], lanes16(count));
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      sums[t * kRows + r] = dot<Input>(weights, _mm512_load_ps(x + t * width), sums[t * kRows + r]);
    }
  }
}

template <class T, int kTokens, class Input>
CLEX_NATIVE void multiply_tokens_native(const RowPointers<T>& rows, const RowPointers<T>* next, const Input* x,
                                        int64_t width, int64_t channels, float* products) {
  constexpr int64_t kVector = 64 / sizeof(Input), kLine = 64 / sizeof(T);
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + kLine <= channels; c += kLine) {
    if (next) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next->row[r] + c, 0, 2);
    }
#pragma GCC unroll 2
    for (int64_t d = c; d < c + kLine; d += kVector) {
      add_products_native<T, kTokens>(rows.at(d), kVector, x + d, width, sums);
    }
  }
  for (; c < channels; c += kVector) {
    add_products_native<T, kTokens>(rows.at(c), channels - c, x + c, width, sums);
  }
  _mm512_mask_storeu_ps(products, lanes16(kTokens * kRows), sum_lanes(sums));
}

template <class T>
struct NativeProducts {
  using Input = std::conditional_t<std::is_same_v<T, Bf16>, Bf16, float>;

  CLEX_AVX512_BF16 static void multiply(const RowPointers<T>& rows, const RowPointers<T>* next, const Input* x,
                                        int64_t tokens, int64_t width, int64_t channels, float* products) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4, next = nullptr) {
      multiply_tokens_native<T, 4>(rows, next, x + t * width, width, channels, products + t * kRows);
    }
    for (; t + 2 <= tokens; t += 2, next = nullptr) {
      multiply_tokens_native<T, 2>(rows, next, x + t * width, width, channels, products + t * kRows);
    }
    if (t < tokens) {
      multiply_tokens_native<T, 1>(rows, next, x + t * width, width, channels, products + t * kRows);
    }
  }
};
#endif

template <class T>
void store_rows(const ProjectionTarget& target, int64_t token, int64_t dim, const RowBlock& block,
                const Real<T> (&values)[kRows]) {
  T* out = static_cast<T*>(target.data) + token * target.stride + block.head * dim;
  for (int64_t r = 0; r < kRows; ++r) narrow(values[r], out[block.rows[r]]);
}

// Adds the bias to products [B L, 4] of a block, rotates and rounds them.
template <class T>
void finish_block(const QkvRotaryPlan& plan, const RowBlock& block, const Real<T>* products) {
  using R = Real<T>;
  const QkvRotaryCall& call = *plan.call;
  const Projection& projection = *block.projection;
  const int64_t dim = call.rotary.dim, pairs = call.rotary.pairs;
  R bias[kRows] = {};
  for (int64_t r = 0; projection.bias && r < kRows; ++r) {
    const int64_t row = block.head * dim + block.rows[r];
    bias[r] = widen(static_cast<const T*>(projection.bias)[row * projection.bias_stride]);
  }
  const R* cosine = static_cast<const R*>(plan.rows);
  for (int64_t token = 0; token < call.rotary.batch * call.rotary.length; ++token) {
    R y[kRows];
    for (int64_t r = 0; r < kRows; ++r) y[r] = products[token * kRows + r] + bias[r];
    if (projection.raw.data) store_rows<T>(projection.raw, token, dim, block, y);
    for (int64_t r = 0; block.rotates && r < kRows; r += 2) {
      const R c = cosine[block.rows[r]], s = cosine[pairs + block.rows[r]], y0 = y[r], y1 = y[r + 1];
      y[r] = y0 * c - y1 * s;
      y[r + 1] = y1 * c + y0 * s;
    }
    store_rows<T>(projection.out, token, dim, block, y);
    cosine += 2 * pairs;
  }
}

template <class T, class Input>
void pack_token(const T* x, int64_t stride, int64_t channels, Input* packed) {
  for (int64_t c = 0; c < channels; ++c) {
    if constexpr (std::is_same_v<T, Input>) {
      packed[c] = x[c * stride];
    } else {
      packed[c] = widen(x[c * stride]);
    }
  }
}

template <class T, class Products>
void work_by(QkvRotaryPlan& plan) {
  using R = Real<T>;
  const QkvRotaryCall& call = *plan.call;
  const auto* x = static_cast<const typename Products::Input*>(plan.x);
  const int64_t tokens = call.rotary.batch * call.rotary.length;
  thread_local Workspace workspace;
  R* products = reinterpret_cast<R*>(workspace.reserve(tokens * kRows * sizeof(R)));
  int64_t item = plan.next_item++;
  while (item < plan.items) {
    const int64_t upcoming = plan.next_item++;
    const int64_t first = item * plan.item_blocks, last = std::min(first + plan.item_blocks, plan.all_blocks);
    for (int64_t index = first; index < last; ++index) {
      const int64_t following = index + 1 < last ? index + 1 : upcoming * plan.item_blocks;
      const RowBlock block = block_at(plan, index);
      const RowPointers<T> rows = pointers_of<T>(call, block);
      const bool more = following < plan.all_blocks;
      const RowPointers<T> next = more ? pointers_of<T>(call, block_at(plan, following)) : rows;
      Products::multiply(rows, more ? &next : nullptr, x, tokens, plan.width, call.channels, products);
      finish_block<T>(plan, block, products);
    }
    item = upcoming;
  }
}

template <class T, class Products>
void plan_by(const QkvRotaryCall& call, Workspace& workspace, QkvRotaryPlan& plan) {
  using R = Real<T>;
  using Input = typename Products::Input;
  const int64_t tokens = call.rotary.batch * call.rotary.length, pairs = call.rotary.pairs;
  Input* x = nullptr;
  R* rows = nullptr;
  const auto carve = [&](Carver carver) {
    x = carver.take<Input>(tokens * plan.width);
    rows = carver.take<R>(tokens * 2 * pairs);
    return carver.bytes;
  };
  carve(Carver(workspace.reserve(carve(Carver(nullptr)))));
  plan.x = x;
  plan.rows = rows;
  const int64_t* strides = call.x_strides;
  for (int64_t token = 0; token < tokens; ++token, x += plan.width, rows += 2 * pairs) {
    const int64_t b = token / call.rotary.length, l = token % call.rotary.length;
    const T* token_x = static_cast<const T*>(call.x) + b * strides[0] + l * strides[1];
    // a constant stride lets compilers vectorise.
    pack_token(token_x, strides[2] == 1 ? 1 : strides[2], call.channels, x);
    std::fill(x + call.channels, x + plan.width, Input{});
    fill_row(call.rotary, b, l, rows, rows + pairs);
  }
}

// act(products of this processor) for elements of T.
template <class T, class Act>
void with_products(const Act& act) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 2) {
    if (has_avx512_bf16()) return act(NativeProducts<T>());
  }
#endif
  act(PortableProducts<T>());
}

template <class T>
void plan_elements(const QkvRotaryCall& call, Workspace& workspace, QkvRotaryPlan& plan) {
  with_products<T>([&](auto products) { plan_by<T, decltype(products)>(call, workspace, plan); });
  plan.item_blocks = std::max<int64_t>(kItemBytes / (kRows * plan.width * sizeof(T)), 1);
  plan.items = ceil_div(plan.all_blocks, plan.item_blocks);
}

template <class T>
void work(QkvRotaryPlan& plan) {
  with_products<T>([&](auto products) { work_by<T, decltype(products)>(plan); });
}

}  // namespace

void plan_qkv_rotary(const QkvRotaryCall& call, Workspace& workspace, QkvRotaryPlan& plan) {
  plan.call = &call;
  plan.width = std::max<int64_t>(ceil_div(call.channels, 32), 1) * 32;
  for (int i = 0; i < 3; ++i) {
    const int64_t pairs = pairs_of(call, call.projections[i]);
    plan.blocks[i] = ceil_div(pairs, 2) + ceil_div(call.rotary.dim - 2 * pairs, kRows);
    plan.all_blocks += call.projections[i].heads * plan.blocks[i];
  }
  switch (call.rotary.element) {
    case Element::fp32: return plan_elements<float>(call, workspace, plan);
    case Element::fp16: return plan_elements<Fp16>(call, workspace, plan);
    case Element::bf16: return plan_elements<Bf16>(call, workspace, plan);
    case Element::fp64: return plan_elements<double>(call, workspace, plan);
  }
}

void qkv_rotary_items(QkvRotaryPlan& plan) {
  switch (plan.call->rotary.element) {
    case Element::fp32: return work<float>(plan);
    case Element::fp16: return work<Fp16>(plan);
    case Element::bf16: return work<Bf16>(plan);
    case Element::fp64: return work<double>(plan);
  }
}

}  // namespace clex
