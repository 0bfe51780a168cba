// Unpacks what rotary operators are given.
#pragma once

#include "bindings.h"
#include "rotary.h"

namespace clex {

inline RotaryTensor rotary_tensor(const Tensor& source, const Tensor& target) {
  RotaryTensor tensor;
  tensor.heads = source.size(2);
  tensor.source = source.const_data_ptr();
  tensor.target = target.mutable_data_ptr();
  set_strides(source, tensor.source_strides);
  set_strides(target, tensor.target_strides);
  return tensor;
}

// everything but the tensors to rotate.
inline RotaryCall rotary_call(const Tensor& q, const Tensor& coarse, const Tensor& fine,
                              const std::optional<Tensor>& positions, const std::optional<Tensor>& index,
                              const std::optional<Tensor>& position_ids, int64_t offset) {
  RotaryCall call;
  call.element = element_of(q);
  call.batch = q.size(0);
  call.length = q.size(1);
  call.dim = q.size(3);
  call.offset = offset;
  set_tables(coarse, fine, call);
  if (positions) {
    call.positions = positions->const_data_ptr<double>();
    call.positions_strides[0] = positions->size(0) == 1 ? 0 : positions->stride(0);
    call.positions_strides[1] = positions->stride(1);
  }
  if (index) {
    call.index = index->const_data_ptr<int64_t>();
    call.index_stride = index->stride(0);
  }
  if (position_ids) {
    call.position_ids = position_ids->const_data_ptr<int64_t>();
    call.position_ids_strides[0] = position_ids->size(0) == 1 ? 0 : position_ids->stride(0);
    call.position_ids_strides[1] = position_ids->stride(1);
  }
  return call;
}

inline void rotate_tokens(const RotaryCall& call) {
  const int64_t token_size = (call.tensors[0].heads + call.tensors[1].heads) * call.dim;
  const int64_t grain = 32768 / (token_size + 1) + 1;
  torch::stable::parallel_for(0, call.batch * call.length, grain,
                              [&](int64_t begin, int64_t end) { rotary(call, begin, end); });
}

}  // namespace clex
