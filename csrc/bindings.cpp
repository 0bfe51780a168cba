// The only file that sees torch: checks nothing twice (Python validates), unpacks tensors, calls the torch-free code.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "frequencies.h"
#include "isa.h"
#include "rotary.h"
#include "table_cache.h"
#include "tables.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---------------------------------------------------------------- frequencies

// the dispatcher takes a microsecond to find that there is nothing to do.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

clex::FrequencySizes frequency_sizes(const Tensor& up, int64_t count, double log_rope_base, double log_ntk_base,
                                     const std::string& activation) {
  return {static_cast<int>(up.size(0)), static_cast<int>(up.size(1)), static_cast<int>(count), log_rope_base,
          log_ntk_base, activation == "silu"};
}

void check_solved(clex::Solved solved) {
  STD_TORCH_CHECK(solved != clex::Solved::bad_weights, "up, down: expected finite values");
  STD_TORCH_CHECK(solved != clex::Solved::bad_times, "times: expected finite values >= 1 in non-decreasing order");
  STD_TORCH_CHECK(solved == clex::Solved::yes, "the frequency ODE did not converge within ",
                  clex::trajectory_steps(), " steps: its weights are too large");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_frequencies(Tensor up, Tensor down, Tensor times,
                                                             double log_rope_base, double log_ntk_base,
                                                             std::string activation, std::optional<Tensor> frozen) {
  up = dense(up);
  down = dense(down);
  times = dense(times);
  if (frozen) frozen = dense(*frozen);
  const int64_t pairs = up.size(0), count = times.size(0), steps = clex::trajectory_steps();
  Tensor freq = torch::stable::new_empty(times, {count, pairs});
  Tensor nodes = torch::stable::new_empty(times, {steps + 1});
  Tensor states = torch::stable::new_empty(times, {steps, pairs});
  Tensor evaluations = torch::stable::new_empty(times, {1}, ScalarType::Long);
  const auto sizes = frequency_sizes(up, count, log_rope_base, log_ntk_base, activation);
  const auto solve = [&]<class W>() {
    return clex::solve_frequencies_cpu<W>(
        sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), times.const_data_ptr<double>(),
        frozen ? frozen->const_data_ptr<double>() : nullptr, freq.mutable_data_ptr<double>(),
        nodes.mutable_data_ptr<double>(), states.mutable_data_ptr<double>(), evaluations.mutable_data_ptr<int64_t>());
  };
  const bool wide = up.scalar_type() == ScalarType::Double;
  check_solved(wide ? solve.operator()<double>() : solve.operator()<float>());
  return {freq, nodes, states, evaluations};
}

std::tuple<Tensor, Tensor> solve_frequencies_bwd(Tensor dfreq, Tensor freq, Tensor up, Tensor down, Tensor times,
                                                 Tensor nodes, Tensor states, double log_ntk_base,
                                                 std::string activation) {
  for (Tensor* tensor : {&dfreq, &freq, &up, &down, &times, &nodes, &states}) {
    *tensor = dense(*tensor);
  }
  Tensor dup = torch::stable::new_empty(up, {up.size(0), up.size(1)});
  Tensor ddown = torch::stable::new_empty(down, {down.size(0), down.size(1)});
  const auto sizes = frequency_sizes(up, times.size(0), 0, log_ntk_base, activation);
  const auto solve = [&]<class W>() {
    clex::solve_frequencies_bwd_cpu<W>(
        sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), times.const_data_ptr<double>(),
        nodes.const_data_ptr<double>(), states.const_data_ptr<double>(), freq.const_data_ptr<double>(),
        dfreq.const_data_ptr<double>(), dup.mutable_data_ptr<W>(), ddown.mutable_data_ptr<W>());
  };
  up.scalar_type() == ScalarType::Double ? solve.operator()<double>() : solve.operator()<float>();
  return {dup, ddown};
}

std::tuple<Tensor, Tensor> trajectory(Tensor up, Tensor down, double last, double log_rope_base, double log_ntk_base,
                                      std::string activation) {
  up = dense(up);
  down = dense(down);
  const int64_t pairs = up.size(0), steps = clex::trajectory_steps();
  Tensor nodes = torch::stable::new_empty(up, {steps + 1}, ScalarType::Double);
  Tensor polynomials = torch::stable::new_empty(up, {steps, clex::trajectory_terms(), pairs}, ScalarType::Double);
  const auto sizes = frequency_sizes(up, 0, log_rope_base, log_ntk_base, activation);
  const auto solve = [&]<class W>() {
    return clex::trajectory_cpu<W>(sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), last,
                                   nodes.mutable_data_ptr<double>(), polynomials.mutable_data_ptr<double>());
  };
  const bool wide = up.scalar_type() == ScalarType::Double;
  check_solved(wide ? solve.operator()<double>() : solve.operator()<float>());
  return {nodes, polynomials};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) {
  m.impl("solve_frequencies", TORCH_BOX(&solve_frequencies));
  m.impl("solve_frequencies_bwd", TORCH_BOX(&solve_frequencies_bwd));
  m.impl("trajectory", TORCH_BOX(&trajectory));
}

#ifdef CLEX_WITH_CUDA
namespace {

void check_launched(const char* error) { STD_TORCH_CHECK(!error, "CUDA: ", error ? error : ""); }

// all tensors contiguous; the stream comes as an int, so that nothing of libtorch_cuda is linked.
void solve_frequencies_cuda(Tensor up, Tensor down, Tensor times, std::optional<Tensor> frozen, double log_rope_base,
                            double log_ntk_base, std::string activation, Tensor freq, Tensor nodes, Tensor states,
                            Tensor evaluations, int64_t stream) {
  const auto sizes = frequency_sizes(up, times.size(0), log_rope_base, log_ntk_base, activation);
  Tensor memory = torch::stable::new_empty(times, {clex::memory_doubles(sizes)});
  const auto launch = [&]<class W>() {
    check_launched(clex::solve_frequencies_cuda<W>(
        sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), times.const_data_ptr<double>(),
        frozen ? frozen->const_data_ptr<double>() : nullptr, freq.mutable_data_ptr<double>(),
        nodes.mutable_data_ptr<double>(), states.mutable_data_ptr<double>(), evaluations.mutable_data_ptr<int64_t>(),
        memory.mutable_data_ptr<double>(), reinterpret_cast<void*>(stream)));
  };
  up.scalar_type() == ScalarType::Double ? launch.operator()<double>() : launch.operator()<float>();
}

void trajectory_cuda(Tensor up, Tensor down, double last, double log_rope_base, double log_ntk_base,
                     std::string activation, Tensor nodes, Tensor polynomials, int64_t stream) {
  const auto sizes = frequency_sizes(up, 0, log_rope_base, log_ntk_base, activation);
  Tensor memory = torch::stable::new_empty(nodes, {clex::memory_doubles(sizes)});
  Tensor evaluations = torch::stable::new_empty(nodes, {1}, ScalarType::Long);
  const auto launch = [&]<class W>() {
    check_launched(clex::trajectory_cuda<W>(sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), last,
                                            nodes.mutable_data_ptr<double>(), polynomials.mutable_data_ptr<double>(),
                                            evaluations.mutable_data_ptr<int64_t>(),
                                            memory.mutable_data_ptr<double>(), reinterpret_cast<void*>(stream)));
  };
  up.scalar_type() == ScalarType::Double ? launch.operator()<double>() : launch.operator()<float>();
}

void solve_frequencies_bwd_cuda(Tensor dfreq, Tensor freq, Tensor up, Tensor down, Tensor times, Tensor nodes,
                                Tensor states, double log_ntk_base, std::string activation, Tensor dup, Tensor ddown,
                                int64_t stream) {
  const auto sizes = frequency_sizes(up, times.size(0), 0, log_ntk_base, activation);
  Tensor memory = torch::stable::new_empty(times, {clex::memory_doubles(sizes)});
  const auto launch = [&]<class W>() {
    check_launched(clex::solve_frequencies_bwd_cuda<W>(
        sizes, up.const_data_ptr<W>(), down.const_data_ptr<W>(), times.const_data_ptr<double>(),
        nodes.const_data_ptr<double>(), states.const_data_ptr<double>(), freq.const_data_ptr<double>(),
        dfreq.const_data_ptr<double>(), dup.mutable_data_ptr<double>(), ddown.mutable_data_ptr<double>(),
        memory.mutable_data_ptr<double>(), reinterpret_cast<void*>(stream)));
  };
  up.scalar_type() == ScalarType::Double ? launch.operator()<double>() : launch.operator()<float>();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clex_cuda, m) {
  m.def(
      "solve_frequencies(Tensor up, Tensor down, Tensor times, Tensor? frozen_nodes, float log_rope_base, "
      "float log_ntk_base, str activation, Tensor(a!) freq, Tensor(b!) nodes, Tensor(c!) states, "
      "Tensor(d!) evaluations, int stream) -> ()");
  m.def(
      "trajectory(Tensor up, Tensor down, float last, float log_rope_base, float log_ntk_base, str activation, "
      "Tensor(a!) nodes, Tensor(b!) polynomials, int stream) -> ()");
  m.def(
      "solve_frequencies_bwd(Tensor dfreq, Tensor freq, Tensor up, Tensor down, Tensor times, Tensor nodes, "
      "Tensor states, float log_ntk_base, str activation, Tensor(a!) dup, Tensor(b!) ddown, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clex_cuda, CUDA, m) {
  m.impl("solve_frequencies", TORCH_BOX(&solve_frequencies_cuda));
  m.impl("trajectory", TORCH_BOX(&trajectory_cuda));
  m.impl("solve_frequencies_bwd", TORCH_BOX(&solve_frequencies_bwd_cuda));
}
#endif

namespace {

// ---------------------------------------------------------------- tables

// a block of 64 rows takes 2 to 6 us: with fewer of them a thread costs more than it saves.
constexpr int64_t TABLE_GRAIN = 8;

template <class T>
void fill_tables(const clex::TableSpec& coarse, const clex::TableSpec& fine, T* coarse_out, T* fine_out) {
  using torch::stable::parallel_for;
  const bool by_products = coarse.positions == nullptr;
  clex::TableSpec steps = coarse;
  steps.rows = by_products ? std::min(coarse.rows, clex::TABLE_TILE) : 0;
  steps.amplitude = 1.0;
  std::vector<double> step_rows(steps.factors * steps.rows * 2 * steps.pairs);
  // a fine table and the steps are one block per factor each.
  parallel_for(0, coarse.factors, TABLE_GRAIN, [&](int64_t begin, int64_t end) {
    clex::fill_table_direct(fine, begin, end, fine_out);
    if (steps.rows > 0) clex::fill_table_direct(steps, begin, end, step_rows.data());
  });
  const int64_t blocks = coarse.factors * clex::table_blocks(coarse.rows);
  parallel_for(0, blocks, TABLE_GRAIN, [&](int64_t begin, int64_t end) {
    if (by_products) {
      clex::fill_table_by_products(coarse, step_rows.data(), begin, end, coarse_out);
    } else {
      clex::fill_table_direct(coarse, begin, end, coarse_out);
    }
  });
}

// freq [T, R], positions [T, L] or [1, L], contiguous fp64; coarse [T, C, 2, R], fine [T, F, 2, R].
std::tuple<clex::TableSpec, clex::TableSpec> table_specs(const Tensor& freq,
                                                         const std::optional<Tensor>& positions,
                                                         double amplitude, int64_t coarse_rows,
                                                         int64_t fine_rows) {
  clex::TableSpec coarse{};
  coarse.freq = freq.const_data_ptr<double>();
  coarse.positions = positions ? positions->const_data_ptr<double>() : nullptr;
  coarse.factors = freq.size(0);
  coarse.rows = coarse_rows;
  coarse.pairs = freq.size(1);
  coarse.position_stride = positions && positions->size(0) > 1 ? positions->size(1) : 0;
  coarse.spacing = clex::TABLE_TILE;
  coarse.amplitude = amplitude;
  clex::TableSpec fine = coarse;
  fine.positions = nullptr;
  fine.rows = fine_rows;
  fine.spacing = 1.0;
  fine.amplitude = 1.0;
  return {coarse, fine};
}

std::tuple<Tensor, Tensor> tables_cpu(Tensor freq, int64_t length, std::optional<Tensor> positions,
                                      double amplitude, ScalarType dtype) {
  freq = torch::stable::contiguous(freq);
  if (positions) positions = torch::stable::contiguous(*positions);
  const int64_t tile = positions ? 1 : clex::TABLE_TILE;
  const int64_t coarse_rows = positions ? positions->size(1) : (length + tile - 1) / tile;
  const auto [coarse, fine] = table_specs(freq, positions, amplitude, coarse_rows, tile);
  Tensor coarse_out = torch::stable::empty({coarse.factors, coarse.rows, 2, coarse.pairs}, dtype);
  Tensor fine_out = torch::stable::empty({fine.factors, fine.rows, 2, fine.pairs}, dtype);
  if (dtype == ScalarType::Double) {
    fill_tables(coarse, fine, coarse_out.mutable_data_ptr<double>(), fine_out.mutable_data_ptr<double>());
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Float, "tables are stored in float32 or float64");
    fill_tables(coarse, fine, coarse_out.mutable_data_ptr<float>(), fine_out.mutable_data_ptr<float>());
  }
  return {coarse_out, fine_out};
}

#ifdef CLEX_WITH_CUDA

template <class T>
void launch_tables(const clex::TableSpec& coarse, const clex::TableSpec& fine, T* coarse_out, T* fine_out,
                   void* stream) {
  const char* error = clex::launch_fill_table(coarse, coarse_out, stream);
  if (!error) error = clex::launch_fill_table(fine, fine_out, stream);
  STD_TORCH_CHECK(!error, "tables: ", error);
}

void tables_cuda(Tensor freq, std::optional<Tensor> positions, double amplitude, Tensor coarse_out,
                 Tensor fine_out, int64_t stream) {
  const auto [coarse, fine] = table_specs(freq, positions, amplitude, coarse_out.size(1), fine_out.size(1));
  void* const on = reinterpret_cast<void*>(stream);
  if (coarse_out.scalar_type() == ScalarType::Double) {
    launch_tables(coarse, fine, coarse_out.mutable_data_ptr<double>(), fine_out.mutable_data_ptr<double>(),
                  on);
  } else {
    launch_tables(coarse, fine, coarse_out.mutable_data_ptr<float>(), fine_out.mutable_data_ptr<float>(), on);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(clex_cuda, m) {
  m.def(
      "tables(Tensor freq, Tensor? positions, float amplitude, Tensor(a!) coarse, Tensor(b!) fine,"
      " int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clex_cuda, CUDA, m) { m.impl("tables", TORCH_BOX(&tables_cuda)); }

#endif

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("tables", TORCH_BOX(&tables_cpu)); }

// ---------------------------------------------------------------- table_cache

using Tensors = std::vector<Tensor>;

std::shared_ptr<clex::TableCache> table_cache(int64_t handle) {
  auto cache = clex::find_table_cache(handle);
  STD_TORCH_CHECK(cache != nullptr, "table cache ", handle, " does not exist");
  return cache;
}

// an empty list is a miss: a stored payload has at least one tensor.
Tensors table_cache_get(int64_t handle, std::string key, int64_t length, int64_t fingerprint, bool pin) {
  const clex::Payload payload = table_cache(handle)->get(key, length, fingerprint, pin);
  return payload ? *std::static_pointer_cast<Tensors>(payload) : Tensors{};
}

void table_cache_put(int64_t handle, std::string key, int64_t length, int64_t fingerprint, Tensors tensors) {
  int64_t bytes = 0;
  for (const Tensor& tensor : tensors) bytes += tensor.numel() * static_cast<int64_t>(tensor.element_size());
  auto payload = std::make_shared<Tensors>(std::move(tensors));
  table_cache(handle)->put(key, length, fingerprint, std::move(payload), bytes);
}

void table_cache_invalidate(int64_t handle) { table_cache(handle)->invalidate(); }

std::vector<int64_t> table_cache_stats(int64_t handle) {
  const clex::TableCacheStats stats = table_cache(handle)->stats();
  return {stats.hits, stats.misses, stats.evictions, stats.bytes, stats.entries, stats.invalidations};
}

// of contents, shapes and element sizes.
int64_t fingerprint(Tensors tensors) {
  uint64_t hash = tensors.size();
  for (const Tensor& strided : tensors) {
    const Tensor tensor = torch::stable::contiguous(strided);
    std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
    shape.push_back(static_cast<int64_t>(tensor.element_size()));
    hash = clex::hash_bytes(shape.data(), shape.size() * sizeof(int64_t), hash);
    hash = clex::hash_bytes(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), hash);
  }
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(clex, CompositeExplicitAutograd, m) {
  m.impl("table_cache_create", TORCH_BOX(&clex::create_table_cache));
  m.impl("table_cache_destroy", TORCH_BOX(&clex::destroy_table_cache));
  m.impl("table_cache_get", TORCH_BOX(&table_cache_get));
  m.impl("table_cache_put", TORCH_BOX(&table_cache_put));
  m.impl("table_cache_invalidate", TORCH_BOX(&table_cache_invalidate));
  m.impl("table_cache_stats", TORCH_BOX(&table_cache_stats));
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

// ---------------------------------------------------------------- rotary

clex::Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return clex::Element::fp32;
    case ScalarType::Half: return clex::Element::fp16;
    case ScalarType::BFloat16: return clex::Element::bf16;
    case ScalarType::Double: return clex::Element::fp64;
    default: STD_TORCH_CHECK(false, "rotary: unsupported dtype");
  }
}

void set_strides(const Tensor& x, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1 || x.numel() == 0, "rotary: D must have unit stride");
  for (int i = 0; i < 3; ++i) strides[i] = x.stride(i);
}

clex::RotaryTensor rotary_tensor(const Tensor& source, const Tensor& target) {
  clex::RotaryTensor tensor;
  tensor.heads = source.size(2);
  tensor.source = source.const_data_ptr();
  tensor.target = target.mutable_data_ptr();
  set_strides(source, tensor.source_strides);
  set_strides(target, tensor.target_strides);
  return tensor;
}

// everything but the tensors to rotate.
clex::RotaryCall rotary_call(const Tensor& q, const Tensor& coarse, const Tensor& fine,
                             const std::optional<Tensor>& positions, const std::optional<Tensor>& index,
                             const std::optional<Tensor>& position_ids, int64_t offset) {
  const bool is_double = q.scalar_type() == ScalarType::Double;
  const ScalarType table_type = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coarse.scalar_type() == table_type && fine.scalar_type() == table_type,
                  "rotary: the table must be fp64 for fp64 tensors, else fp32");
  clex::RotaryCall call;
  call.element = element_of(q);
  call.batch = q.size(0);
  call.length = q.size(1);
  call.dim = q.size(3);
  call.pairs = coarse.size(3);
  call.tables = coarse.size(0);
  call.tiles = coarse.size(1);
  call.tile = fine.size(1);
  call.offset = offset;
  for (const Tensor* table : {&coarse, &fine}) {
    STD_TORCH_CHECK(table->stride(3) == 1 && table->stride(2) == call.pairs,
                    "rotary: a table's rows must be dense");
  }
  call.coarse = coarse.const_data_ptr();
  call.fine = fine.const_data_ptr();
  for (int i = 0; i < 2; ++i) {
    call.coarse_strides[i] = coarse.stride(i);
    call.fine_strides[i] = fine.stride(i);
  }
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

Tensor fresh_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  clex::advise_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
  return y;
}

void rotate_tokens(const clex::RotaryCall& call) {
  const int64_t token_size = (call.tensors[0].heads + call.tensors[1].heads) * call.dim;
  const int64_t grain = 32768 / (token_size + 1) + 1;
  torch::stable::parallel_for(0, call.batch * call.length, grain,
                              [&](int64_t begin, int64_t end) { clex::rotary(call, begin, end); });
}

void rotary_out_cpu(const Tensor& q, const std::optional<Tensor>& k, const Tensor& coarse, const Tensor& fine,
                    const std::optional<Tensor>& index, const std::optional<Tensor>& position_ids,
                    int64_t offset, bool conjugate, const Tensor& q_out, const std::optional<Tensor>& k_out) {
  clex::RotaryCall call = rotary_call(q, coarse, fine, std::nullopt, index, position_ids, offset);
  call.conjugate = conjugate;
  call.tensors[0] = rotary_tensor(q, q_out);
  if (k) call.tensors[1] = rotary_tensor(*k, *k_out);
  rotate_tokens(call);
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

std::tuple<Tensor, Tensor, Tensor> rotary_bwd_cpu(const Tensor& dq_out, const std::optional<Tensor>& dk_out,
                                                  const std::optional<Tensor>& q_out,
                                                  const std::optional<Tensor>& k_out, const Tensor& coarse,
                                                  const Tensor& fine, const std::optional<Tensor>& positions,
                                                  const std::optional<Tensor>& index,
                                                  const std::optional<Tensor>& position_ids, int64_t offset) {
  Tensor dq = fresh_like(dq_out);
  Tensor dk = dk_out ? fresh_like(*dk_out) : torch::stable::new_empty(dq_out, {0});
  clex::RotaryCall call = rotary_call(dq_out, coarse, fine, positions, index, position_ids, offset);
  call.conjugate = true;
  call.tensors[0] = rotary_tensor(dq_out, dq);
  if (dk_out) call.tensors[1] = rotary_tensor(*dk_out, dk);
  if (!q_out) {
    rotate_tokens(call);
    return {dq, dk, torch::stable::new_empty(dq_out, {0}, ScalarType::Double)};
  }
  const std::optional<Tensor>* saved[] = {&q_out, &k_out};
  for (int i = 0; i < 2; ++i) {
    if (!*saved[i]) continue;
    call.tensors[i].rotated = (*saved[i])->const_data_ptr();
    set_strides(**saved[i], call.tensors[i].rotated_strides);
  }
  const int64_t chunks = clex::rotary_bwd_chunks(call);
  std::vector<double> partials(chunks * call.pairs);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    clex::rotary_bwd(call, begin, end, partials.data());
  });
  Tensor dfreq = torch::stable::new_zeros(dq_out, {call.tables, call.pairs}, ScalarType::Double);
  clex::rotary_bwd_reduce(call, partials.data(), dfreq.mutable_data_ptr<double>());
  return {dq, dk, dfreq};
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
  m.impl("rotary_", TORCH_BOX(&rotary_in_place_cpu));
  m.impl("rotary_out", TORCH_BOX(&rotary_out_cpu));
  m.impl("rotary_bwd", TORCH_BOX(&rotary_bwd_cpu));
}

// ---------------------------------------------------------------- module

PyObject* isa_name(PyObject*, PyObject*) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return PyUnicode_FromString(names[static_cast<int>(clex::active_isa())]);
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  const long level = PyLong_AsLong(argument);
  if (level == -1 && PyErr_Occurred()) return nullptr;
  if (level < 0 || level > static_cast<long>(clex::detect_isa())) {
    PyErr_SetString(PyExc_ValueError, "this processor does not have that instruction set");
    return nullptr;
  }
  clex::active_isa() = static_cast<clex::Isa>(level);
  Py_RETURN_NONE;
}

PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef CLEX_WITH_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

PyObject* build_reason(PyObject*, PyObject*) { return PyUnicode_FromString(CLEX_BUILD_REASON); }

PyMethodDef methods[] = {
    {"isa", isa_name, METH_NOARGS, "instruction set in use: baseline, avx2 or avx512"},
    {"set_isa", set_isa, METH_O, "use a narrower instruction set: 0, 1 or 2 (for tests)"},
    {"has_cuda", has_cuda, METH_NOARGS, "whether the CUDA C++ kernels were built"},
    {"build_reason", build_reason, METH_NOARGS, "why CUDA C++ was or was not built"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
