#include "bindings.h"

#include <algorithm>
#include <limits>

#include "decode.h"

namespace {

clex::Cache cache(const Tensor& x) {
  clex::Cache result;
  result.data = x.const_data_ptr();
  clex::set_strides(x, result.strides);
  return result;
}

// one worker for each thread that torch lends: they share out the items among themselves.
void decode_into(const clex::DecodeCall& call) {
  thread_local clex::Workspace workspaces[2];
  clex::DecodePlan plan;
  clex::plan_decode(call, workspaces, plan);
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t, int64_t) { clex::decode_items(plan); });
  const int64_t sums = plan.ranges * plan.rows * plan.width + 1;
  torch::stable::parallel_for(0, call.batch * call.kv_heads, 32768 / sums + 1,
                              [&](int64_t begin, int64_t end) { clex::merge_decode(plan, begin, end); });
}

std::tuple<Tensor, Tensor> decode_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& coarse, const Tensor& fine, const std::optional<Tensor>& index,
                                      const Tensor& kv_end, const std::optional<Tensor>& kv_start,
                                      const std::optional<Tensor>& lengths, const std::optional<Tensor>& block_table,
                                      std::optional<int64_t> train_length, double scale,
                                      std::optional<int64_t> window, std::optional<double> softcap,
                                      std::optional<double> log_base, bool log_clamped, bool rotate_q, bool rotate_k,
                                      bool with_lse) {
  clex::DecodeCall call;
  call.element = clex::element_of(q);
  call.batch = q.size(0);
  call.length = q.size(1);
  call.heads = q.size(2);
  call.dim = q.size(3);
  call.kv_heads = k_cache.size(2);
  call.slots = k_cache.size(1);
  call.q = q.const_data_ptr();
  clex::set_strides(q, call.q_strides);
  call.keys = cache(k_cache);
  call.values = cache(v_cache);
  call.kv_end = clex::integers(kv_end);
  call.kv_start = clex::integers(kv_start);
  call.lengths = clex::integers(lengths);
  if (block_table) {
    call.block_table = clex::integers(block_table);
    call.pages = k_cache.size(0);
    call.page_size = k_cache.size(1);
    call.slots = block_table->size(1) * call.page_size;
  }
  clex::set_tables(coarse, fine, call);
  STD_TORCH_CHECK(call.tile % clex::kBlock == 0 || !(rotate_q || rotate_k), "decode: expected whole blocks in fine");
  if (index) {
    call.index = index->const_data_ptr<int64_t>();
    call.index_stride = index->stride(0);
  }
  call.train_length = train_length.value_or(0);
  call.rotate_q = rotate_q;
  call.rotate_k = rotate_k;
  call.scale = scale;
  call.window = window.value_or(0);
  call.softcap = softcap.value_or(0.0);
  call.log_base = log_base.value_or(0.0);
  call.log_clamped = log_clamped;

  const ScalarType lse_type = call.element == clex::Element::fp64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = with_lse ? torch::stable::new_empty(q, {call.batch, call.heads, call.length}, lse_type)
                        : torch::stable::new_empty(q, {0}, lse_type);
  if (out.numel() == 0) return {out, lse};
  if (k_cache.numel() == 0 || call.slots == 0) {
    torch::stable::zero_(out);
    if (with_lse) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  call.out = out.mutable_data_ptr();
  call.lse = with_lse ? lse.mutable_data_ptr() : nullptr;
  decode_into(call);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("decode", TORCH_BOX(&decode_cpu)); }

}  // namespace
