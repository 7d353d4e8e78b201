// The CUDA kernels of gate_step_ on the host, as functions that tests/ops/test_cuda_kernels.py loads and
// holds against the operator of the CPU.
#include <cstdint>
#include <limits>
#include <vector>

// clang-format off: the emulation comes first, it replaces what the kernels would include.
#include "cuda_emulation.h"
#include "../../csrc/cuda/gate_step.cuh"
// clang-format on

namespace {

template <typename acc>
void step(void* const* arrays, int64_t size, const double* options, int64_t num_gates,
          bool reversed) {
  using namespace pfs::cuda;
  pfs_emulation::reverse_order = reversed;
  // What nobody writes is seen.
  std::vector<acc> partial(num_partials(size), std::numeric_limits<acc>::quiet_NaN());
  const GateArrays<acc> gates{static_cast<acc*>(arrays[0]),     static_cast<const acc*>(arrays[1]),
                              static_cast<acc*>(arrays[2]),     static_cast<acc*>(arrays[3]),
                              static_cast<int64_t*>(arrays[4]), static_cast<int32_t*>(arrays[5]),
                              size};
  const StepOptions given{options[0], options[1], options[2], options[3],
                          options[4], options[5], num_gates};
  take_gate_step(DeviceScope(0), gates, partial.data(), given);
}

}  // namespace

// arrays: gates, grad, exp_avg, exp_avg_sq, step, died_at. options: lr, beta1, beta2, eps, gamma, target.
extern "C" void gate_step_float(void* const* arrays, int64_t size, const double* options,
                                int64_t num_gates, bool reversed) {
  step<float>(arrays, size, options, num_gates, reversed);
}

extern "C" void gate_step_double(void* const* arrays, int64_t size, const double* options,
                                 int64_t num_gates, bool reversed) {
  step<double>(arrays, size, options, num_gates, reversed);
}
