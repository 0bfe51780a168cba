#include "bindings.h"

#include <algorithm>

#include "tables.h"

namespace {

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

}  // namespace
