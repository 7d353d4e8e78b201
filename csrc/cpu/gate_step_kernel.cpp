// One step on all gates: regulariser gradient, Adam, clamp. A single pass over a few thousand
// values, on one thread.
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "../pfs_ops.h"

namespace pfs {
namespace {

struct StepConstants {
  double beta1, beta2, eps, regulariser, step_size, root_correction;
};

template <class T>
void gate_step_kernel(T* gates, const T* grad, T* exp_avg, T* exp_avg_sq, int32_t* died_at,
                      int64_t count, int32_t step, const StepConstants& constants) {
  const T one_minus_beta1 = static_cast<T>(1 - constants.beta1);
  const T beta2 = static_cast<T>(constants.beta2);
  const T one_minus_beta2 = static_cast<T>(1 - constants.beta2);
  const T eps = static_cast<T>(constants.eps);
  const T regulariser = static_cast<T>(constants.regulariser);
  const T step_size = static_cast<T>(constants.step_size);
  const T root_correction = static_cast<T>(constants.root_correction);
  for (int64_t i = 0; i < count; ++i) {
    const T gate = gates[i];
    const T sign = static_cast<T>((gate > 0) - (gate < 0));
    const T g = grad[i] + regulariser * sign;
    const T m = exp_avg[i] + one_minus_beta1 * (g - exp_avg[i]);
    const T v = beta2 * exp_avg_sq[i] + one_minus_beta2 * g * g;
    T next = gate - step_size * m / (std::sqrt(v) / root_correction + eps);
    next = next < 0 ? T(0) : (next > 1 ? T(1) : next);  // NaN compares false and stays NaN
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    gates[i] = next;
    if (next == 0 && died_at[i] < 0) died_at[i] = step;
    if (next > 0) died_at[i] = -1;
  }
}

template <class T>
double mean_abs(const T* gates, int64_t count, int64_t num_gates) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += std::abs(static_cast<double>(gates[i]));
  return total / static_cast<double>(num_gates);
}

}  // namespace

void gate_step_cpu(at::Tensor& gates, const at::Tensor& grad_in, at::Tensor& exp_avg,
                   at::Tensor& exp_avg_sq, at::Tensor& step, at::Tensor& died_at, double lr,
                   double beta1, double beta2, double eps, double gamma, double target,
                   int64_t num_gates) {
  checks::check_gate_step(gates, grad_in, exp_avg, exp_avg_sq, step, died_at, lr, beta1, beta2, eps,
                          gamma, target, num_gates);
  int64_t& count = *step.mutable_data_ptr<int64_t>();
  count += 1;
  const int64_t num_values = gates.numel();
  if (num_values == 0) return;
  const at::Tensor grad = grad_in.contiguous();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* values = gates.mutable_data_ptr<T>();
    const double excess = mean_abs(values, num_values, num_gates) - target;
    const StepConstants constants{beta1,
                                  beta2,
                                  eps,
                                  2 * gamma * excess / static_cast<double>(num_gates),
                                  lr / (1 - std::pow(beta1, static_cast<double>(count))),
                                  std::sqrt(1 - std::pow(beta2, static_cast<double>(count)))};
    gate_step_kernel(values, grad.const_data_ptr<T>(), exp_avg.mutable_data_ptr<T>(),
                     exp_avg_sq.mutable_data_ptr<T>(), died_at.mutable_data_ptr<int32_t>(),
                     num_values, static_cast<int32_t>(count), constants);
  };
  if (gates.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) { m.impl("gate_step_", &pfs::gate_step_cpu); }
