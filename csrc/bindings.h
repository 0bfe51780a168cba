// What the bindings share. They alone see torch: Python has validated, they unpack tensors and call torch-free code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "elements.h"
#include "integers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace clex {

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::fp32;
    case ScalarType::Half: return Element::fp16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Double: return Element::fp64;
    default: STD_TORCH_CHECK(false, "clex: unsupported dtype");
  }
}

// of a tensor of heads, [.., .., heads, D].
inline void set_strides(const Tensor& x, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1 || x.numel() == 0, "clex: D must have unit stride");
  for (int i = 0; i < 3; ++i) strides[i] = x.stride(i);
}

inline Integers integers(const std::optional<Tensor>& x) {
  Integers result;
  if (!x) return result;
  result.wide = x->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(result.wide || x->scalar_type() == ScalarType::Int, "clex: expected int32 or int64");
  result.data = x->const_data_ptr();
  for (int64_t i = 0; i < x->dim(); ++i) result.strides[i] = x->stride(i);
  return result;
}

// A call's factored tables coarse [T, C, 2, R] and fine [T, F, 2, R].
template <class Call>
void set_tables(const Tensor& coarse, const Tensor& fine, Call& call) {
  const ScalarType type = call.element == Element::fp64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coarse.scalar_type() == type && fine.scalar_type() == type,
                  "clex: the table must be fp64 for fp64 tensors, else fp32");
  call.pairs = coarse.size(3);
  call.tables = coarse.size(0);
  call.tiles = coarse.size(1);
  call.tile = fine.size(1);
  for (const Tensor* table : {&coarse, &fine}) {
    STD_TORCH_CHECK(table->stride(3) == 1 && table->stride(2) == call.pairs, "clex: a table's rows must be dense");
  }
  call.coarse = coarse.const_data_ptr();
  call.fine = fine.const_data_ptr();
  for (int i = 0; i < 2; ++i) {
    call.coarse_strides[i] = coarse.stride(i);
    call.fine_strides[i] = fine.stride(i);
  }
}

}  // namespace clex
