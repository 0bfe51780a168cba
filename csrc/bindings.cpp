// The only file that sees torch: checks nothing twice (Python validates), unpacks tensors, calls the torch-free code.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "frequencies.h"
#include "isa.h"

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
