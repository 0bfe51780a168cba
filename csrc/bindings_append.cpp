#include "append.h"

#include "bindings.h"

namespace {

// bytes that are worth another thread.
constexpr int64_t kGrainBytes = 256 << 10;

clex::AppendTensor append_tensor(const Tensor& source, const Tensor& target) {
  clex::AppendTensor tensor;
  tensor.source = static_cast<const char*>(source.const_data_ptr());
  tensor.target = static_cast<char*>(target.mutable_data_ptr());
  clex::set_strides(source, tensor.source_strides);
  clex::set_strides(target, tensor.target_strides);
  for (int i = 0; i < 3; ++i) {
    tensor.source_strides[i] *= static_cast<int64_t>(source.element_size());
    tensor.target_strides[i] *= static_cast<int64_t>(target.element_size());
  }
  return tensor;
}

void append_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_end,
                const std::optional<Tensor>& block_table) {
  // an empty block table has no data, by which the call would tell it from none.
  if (k.numel() == 0 || k_cache.numel() == 0 || (block_table && block_table->numel() == 0)) return;
  clex::AppendCall call;
  call.tensors[0] = append_tensor(k, k_cache);
  call.tensors[1] = append_tensor(v, v_cache);
  call.batch = k.size(0);
  call.length = k.size(1);
  call.heads = k.size(2);
  call.row_bytes = k.size(3) * static_cast<int64_t>(k.element_size());
  call.capacity = k_cache.size(1);
  call.kv_end = clex::integers(kv_end);
  call.block_table = clex::integers(block_table);
  if (block_table) {
    call.pages = k_cache.size(0);
    call.page = k_cache.size(1);
    call.capacity = block_table->size(1) * call.page;
  }
  const int64_t token_bytes = 2 * call.heads * call.row_bytes;
  torch::stable::parallel_for(0, call.batch * call.length, kGrainBytes / token_bytes + 1,
                              [&](int64_t begin, int64_t end) { clex::append(call, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("append", TORCH_BOX(&append_cpu)); }

}  // namespace
