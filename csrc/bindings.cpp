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

#include "isa.h"
#include "table_cache.h"
#include "tables.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---------------------------------------------------------------- tables

// sines and cosines of one row cost about 0.1 us, so below this many blocks a thread costs more than it saves.
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
  parallel_for(0, coarse.factors * clex::table_blocks(coarse.rows), TABLE_GRAIN, [&](int64_t begin, int64_t end) {
    if (by_products) {
      clex::fill_table_by_products(coarse, step_rows.data(), begin, end, coarse_out);
    } else {
      clex::fill_table_direct(coarse, begin, end, coarse_out);
    }
  });
}

// freq [T, R], positions [T, L] or [1, L], contiguous fp64; coarse [T, C, 2, R], fine [T, F, 2, R].
std::tuple<clex::TableSpec, clex::TableSpec> table_specs(const Tensor& freq, const std::optional<Tensor>& positions,
                                                         double amplitude, int64_t coarse_rows, int64_t fine_rows) {
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

std::tuple<Tensor, Tensor> tables_cpu(Tensor freq, int64_t length, std::optional<Tensor> positions, double amplitude,
                                      ScalarType dtype) {
  freq = torch::stable::contiguous(freq);
  if (positions) positions = torch::stable::contiguous(*positions);
  const int64_t coarse_rows = positions ? positions->size(1) : (length + clex::TABLE_TILE - 1) / clex::TABLE_TILE;
  const int64_t fine_rows = positions ? 1 : clex::TABLE_TILE;
  const auto [coarse, fine] = table_specs(freq, positions, amplitude, coarse_rows, fine_rows);
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

void tables_cuda(Tensor freq, std::optional<Tensor> positions, double amplitude, Tensor coarse_out, Tensor fine_out,
                 int64_t stream) {
  const auto [coarse, fine] = table_specs(freq, positions, amplitude, coarse_out.size(1), fine_out.size(1));
  void* const on = reinterpret_cast<void*>(stream);
  if (coarse_out.scalar_type() == ScalarType::Double) {
    launch_tables(coarse, fine, coarse_out.mutable_data_ptr<double>(), fine_out.mutable_data_ptr<double>(), on);
  } else {
    launch_tables(coarse, fine, coarse_out.mutable_data_ptr<float>(), fine_out.mutable_data_ptr<float>(), on);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(clex_cuda, m) {
  m.def("tables(Tensor freq, Tensor? positions, float amplitude, Tensor(a!) coarse, Tensor(b!) fine, int stream) -> ()");
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

// of contiguous tensors: contents, shapes and element sizes.
int64_t fingerprint(Tensors tensors) {
  uint64_t hash = tensors.size();
  for (const Tensor& tensor : tensors) {
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
