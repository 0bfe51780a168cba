#include <algorithm>
#include <array>

#include "bindings_rotary.h"
#include "qkv_rotary.h"

namespace {

// tokens up to which reading the weights is most of the time.
constexpr int64_t kFewTokens = 32;

// Of q, k and v: three weights, or one for all; biases alike, or none.
using Parts = std::array<std::optional<Tensor>, 3>;

struct Heads {
  int64_t counts[3], dim;  // of q, k and v
  int64_t all() const { return counts[0] + counts[1] + counts[2]; }
};

struct Keys {
  bool rotates, both;  // rotated keys are wanted, and raw ones beside them
};

// of a part, or of its rows of what is packed.
void set_projection(const Parts& weights, const Parts& biases, int part, int64_t first_row,
                    clex::Projection& projection) {
  const bool packed = !weights[1];
  const Tensor& weight = *weights[packed ? 0 : part];
  const int64_t row = packed ? first_row : 0, size = static_cast<int64_t>(weight.element_size());
  projection.weight_stride = weight.stride(0);
  projection.weight = static_cast<const char*>(weight.const_data_ptr()) + row * projection.weight_stride * size;
  const std::optional<Tensor>& bias = biases[packed ? 0 : part];
  if (!bias) return;
  projection.bias_stride = bias->stride(0);
  projection.bias = static_cast<const char*>(bias->const_data_ptr()) + row * projection.bias_stride * size;
}

void multiply_few(const Tensor& x, const Parts& weights, const Parts& biases, const clex::RotaryCall& rotary,
                  const Heads& heads, Keys keys, const Tensor& qkv, const Tensor& k_rotated) {
  clex::QkvRotaryCall call;
  call.rotary = rotary;
  call.channels = x.size(2);
  call.x = x.const_data_ptr();
  for (int i = 0; i < 3; ++i) call.x_strides[i] = x.stride(i);
  char* out = static_cast<char*>(qkv.mutable_data_ptr());
  const int64_t stride = heads.all() * heads.dim;
  for (int64_t part = 0, row = 0; part < 3; row += heads.counts[part++] * heads.dim) {
    clex::Projection& projection = call.projections[part];
    projection.heads = heads.counts[part];
    set_projection(weights, biases, part, row, projection);
    projection.rotates = part == 0 || (part == 1 && keys.rotates);
    projection.out = {out + row * static_cast<int64_t>(qkv.element_size()), stride};
    if (part == 1 && keys.both) {
      projection.raw = projection.out;
      projection.out = {k_rotated.mutable_data_ptr(), heads.counts[1] * heads.dim};
    }
  }
  thread_local clex::Workspace workspace;
  clex::QkvRotaryPlan plan;
  clex::plan_qkv_rotary(call, workspace, plan);
  // one worker for each thread that torch lends: they share out the items among themselves.
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t, int64_t) { clex::qkv_rotary_items(plan); });
}

template <class... Arguments>
Tensor call_aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's own product; three weights write to their parts of one result.
Tensor multiply_many(const Tensor& x, const Parts& weights, const Parts& biases, const Heads& heads) {
  const int64_t tokens = x.size(0) * x.size(1), features = heads.all() * heads.dim;
  const Tensor rows = torch::stable::reshape(x, {tokens, x.size(2)});
  Tensor product;
  if (!weights[1]) {
    product = call_aten("aten::linear", "", rows, *weights[0], biases[0]);
  } else {
    product = torch::stable::new_empty(x, {tokens, features});
    for (int64_t part = 0, row = 0; part < 3; row += heads.counts[part++] * heads.dim) {
      const Tensor out = torch::stable::narrow(product, 1, row, heads.counts[part] * heads.dim);
      call_aten("aten::linear", "out", rows, *weights[part], biases[part], out);
    }
  }
  return torch::stable::view(product, {x.size(0), x.size(1), heads.all(), heads.dim});
}

// Rotates q where it lies, and k there or into k_rotated.
void rotate_product(clex::RotaryCall rotary, const Heads& heads, Keys keys, const Tensor& qkv,
                    const Tensor& k_rotated) {
  rotary.tensors[0] = clex::rotary_tensor(qkv, qkv);
  rotary.tensors[0].heads = heads.counts[0];
  if (keys.rotates && !keys.both) rotary.tensors[0].heads += heads.counts[1];
  clex::rotate_tokens(rotary);
  if (!keys.both) return;
  rotary.tensors[0] = clex::rotary_tensor(qkv, k_rotated);
  rotary.tensors[0].heads = heads.counts[1];
  const int64_t q_bytes = heads.counts[0] * heads.dim * static_cast<int64_t>(qkv.element_size());
  rotary.tensors[0].source = static_cast<const char*>(qkv.const_data_ptr()) + q_bytes;
  clex::rotate_tokens(rotary);
}

bool has_dense_rows(const Parts& weights) {
  return std::all_of(weights.begin(), weights.end(),
                     [](const auto& weight) { return !weight || weight->stride(1) == 1 || weight->size(1) == 1; });
}

std::tuple<Tensor, Tensor> qkv_rotary_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& k_weight,
    const std::optional<Tensor>& v_weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& k_bias,
    const std::optional<Tensor>& v_bias, const Tensor& /* freq */, const Tensor& coarse, const Tensor& fine,
    const std::optional<Tensor>& /* positions */, const std::optional<Tensor>& index,
    const std::optional<Tensor>& position_ids, int64_t offset, int64_t num_heads, int64_t num_kv_heads,
    bool rotated_keys, bool raw_keys, bool /* fused */) {
  const Parts weights{weight, k_weight, v_weight}, biases{bias, k_bias, v_bias};
  Heads heads{{num_heads, num_kv_heads, num_kv_heads}, 0};
  heads.dim = weight.size(0) / (k_weight ? num_heads : heads.all());
  const Keys keys{rotated_keys, rotated_keys && raw_keys};
  const int64_t batch = x.size(0), length = x.size(1);
  const bool few = batch * length <= kFewTokens && has_dense_rows(weights);
  Tensor k_rotated = keys.both ? torch::stable::new_empty(x, {batch, length, num_kv_heads, heads.dim})
                               : torch::stable::new_empty(x, {0});
  Tensor qkv = few ? torch::stable::new_empty(x, {batch, length, heads.all(), heads.dim})
                   : multiply_many(x, weights, biases, heads);
  const clex::RotaryCall rotary = clex::rotary_call(qkv, coarse, fine, std::nullopt, index, position_ids, offset);
  if (!few) {
    rotate_product(rotary, heads, keys, qkv, k_rotated);
  } else if (qkv.numel() > 0) {
    multiply_few(x, weights, biases, rotary, heads, keys, qkv, k_rotated);
  }
  return {qkv, k_rotated};
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("qkv_rotary", TORCH_BOX(&qkv_rotary_cpu)); }

}  // namespace
