// gate_step_ on CUDA: arguments and launches of the kernels in gate_step.cuh.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../pfs_ops.h"
#include "gate_step.cuh"

namespace pfs {

void gate_step_cuda(at::Tensor& gates, const at::Tensor& grad, at::Tensor& exp_avg,
                    at::Tensor& exp_avg_sq, at::Tensor& step, at::Tensor& died_at, double lr,
                    double beta1, double beta2, double eps, double gamma, double target,
                    int64_t num_gates) {
  checks::check_gate_step(gates, grad, exp_avg, exp_avg_sq, step, died_at, lr, beta1, beta2, eps,
                          gamma, target, num_gates);
  const cuda::DeviceScope scope(gates.device());
  const cuda::StepOptions options{lr, beta1, beta2, eps, gamma, target, num_gates};
  const at::Tensor dense_grad = grad.contiguous();
  const at::Tensor partial = at::empty({cuda::num_partials(gates.numel())}, gates.options());
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "gate_step_", [&] {
    const cuda::GateArrays<scalar_t> arrays{gates.mutable_data_ptr<scalar_t>(),
                                            dense_grad.const_data_ptr<scalar_t>(),
                                            exp_avg.mutable_data_ptr<scalar_t>(),
                                            exp_avg_sq.mutable_data_ptr<scalar_t>(),
                                            step.mutable_data_ptr<int64_t>(),
                                            died_at.mutable_data_ptr<int32_t>(),
                                            gates.numel()};
    cuda::take_gate_step(scope, arrays, partial.mutable_data_ptr<scalar_t>(), options);
  });
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CUDA, m) { m.impl("gate_step_", &pfs::gate_step_cuda); }
