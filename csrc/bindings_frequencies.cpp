#include "bindings.h"

#include "frequencies.h"

namespace {

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
