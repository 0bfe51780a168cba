#include "bindings_rotary.h"

#include "rotary.h"

namespace {

// of strides that overlap empty_like may make ones without unit stride in D.
Tensor fresh_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  if (y.stride(3) != 1) y = torch::stable::new_empty(x, x.sizes());
  clex::advise_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
  return y;
}

void rotary_out_cpu(const Tensor& q, const std::optional<Tensor>& k, const Tensor& coarse, const Tensor& fine,
                    const std::optional<Tensor>& index, const std::optional<Tensor>& position_ids,
                    int64_t offset, bool conjugate, const Tensor& q_out, const std::optional<Tensor>& k_out) {
  clex::RotaryCall call = clex::rotary_call(q, coarse, fine, std::nullopt, index, position_ids, offset);
  call.conjugate = conjugate;
  call.tensors[0] = clex::rotary_tensor(q, q_out);
  if (k) call.tensors[1] = clex::rotary_tensor(*k, *k_out);
  clex::rotate_tokens(call);
}

void rotary_in_place_cpu(const Tensor& q, const std::optional<Tensor>& k, const Tensor& coarse,
                         const Tensor& fine, const std::optional<Tensor>& index,
                         const std::optional<Tensor>& position_ids, int64_t offset, bool conjugate) {
  rotary_out_cpu(q, k, coarse, fine, index, position_ids, offset, conjugate, q, k);
}

std::tuple<Tensor, Tensor> rotary_cpu(const Tensor& q, const std::optional<Tensor>& k, const Tensor& /* freq */,
                                      const Tensor& coarse, const Tensor& fine,
                                      const std::optional<Tensor>& /* positions */,
                                      const std::optional<Tensor>& index,
                                      const std::optional<Tensor>& position_ids, int64_t offset) {
  Tensor q_out = fresh_like(q);
  Tensor k_out = k ? fresh_like(*k) : torch::stable::new_empty(q, {0});
  rotary_out_cpu(q, k, coarse, fine, index, position_ids, offset, false, q_out,
                 k ? std::optional(k_out) : std::nullopt);
  return {q_out, k_out};
}

// Writes dq and dk, which may be dq_out and dk_out; returns dfreq.
Tensor rotary_bwd_out_cpu(const Tensor& dq_out, const std::optional<Tensor>& dk_out, const Tensor& dq,
                          const std::optional<Tensor>& dk, const std::optional<Tensor>& q_out,
                          const std::optional<Tensor>& k_out, const Tensor& coarse, const Tensor& fine,
                          const std::optional<Tensor>& positions, const std::optional<Tensor>& index,
                          const std::optional<Tensor>& position_ids, int64_t offset) {
  clex::RotaryCall call = clex::rotary_call(dq_out, coarse, fine, positions, index, position_ids, offset);
  call.conjugate = true;
  call.tensors[0] = clex::rotary_tensor(dq_out, dq);
  if (dk_out) call.tensors[1] = clex::rotary_tensor(*dk_out, *dk);
  if (!q_out) {
    clex::rotate_tokens(call);
    return torch::stable::new_empty(dq_out, {0}, ScalarType::Double);
  }
  const std::optional<Tensor>* saved[] = {&q_out, &k_out};
  for (int i = 0; i < 2; ++i) {
    if (!*saved[i]) continue;
    call.tensors[i].rotated = (*saved[i])->const_data_ptr();
    clex::set_strides(**saved[i], call.tensors[i].rotated_strides);
  }
  const int64_t chunks = clex::rotary_bwd_chunks(call);
  std::vector<double> partials(chunks * call.pairs);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    clex::rotary_bwd(call, begin, end, partials.data());
  });
  Tensor dfreq = torch::stable::new_zeros(dq_out, {call.tables, call.pairs}, ScalarType::Double);
  clex::rotary_bwd_reduce(call, partials.data(), dfreq.mutable_data_ptr<double>());
  return dfreq;
}

std::tuple<Tensor, Tensor, Tensor> rotary_bwd_cpu(const Tensor& dq_out, const std::optional<Tensor>& dk_out,
                                                  const std::optional<Tensor>& q_out,
                                                  const std::optional<Tensor>& k_out, const Tensor& coarse,
                                                  const Tensor& fine, const std::optional<Tensor>& positions,
                                                  const std::optional<Tensor>& index,
                                                  const std::optional<Tensor>& position_ids, int64_t offset) {
  Tensor dq = fresh_like(dq_out);
  Tensor dk = dk_out ? fresh_like(*dk_out) : torch::stable::new_empty(dq_out, {0});
  Tensor dfreq = rotary_bwd_out_cpu(dq_out, dk_out, dq, dk, q_out, k_out, coarse, fine, positions, index, position_ids,
                                 offset);
  return {dq, dk, dfreq};
}

Tensor rotary_bwd_in_place_cpu(const Tensor& dq, const std::optional<Tensor>& dk, const std::optional<Tensor>& q_out,
                               const std::optional<Tensor>& k_out, const Tensor& coarse, const Tensor& fine,
                               const std::optional<Tensor>& positions, const std::optional<Tensor>& index,
                               const std::optional<Tensor>& position_ids, int64_t offset) {
  return rotary_bwd_out_cpu(dq, dk, dq, dk, q_out, k_out, coarse, fine, positions, index, position_ids, offset);
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
  m.impl("rotary_", TORCH_BOX(&rotary_in_place_cpu));
  m.impl("rotary_out", TORCH_BOX(&rotary_out_cpu));
  m.impl("rotary_bwd", TORCH_BOX(&rotary_bwd_cpu));
  m.impl("rotary_bwd_", TORCH_BOX(&rotary_bwd_in_place_cpu));
  m.impl("rotary_bwd_out", TORCH_BOX(&rotary_bwd_out_cpu));
}

}  // namespace
