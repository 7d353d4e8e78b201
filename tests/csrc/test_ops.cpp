// The operators called from C++ alone: through the functions of pfs_ops.h and through the
// dispatcher.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "pfs_ops.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  std::printf("%s %s\n", condition ? "ok  " : "FAIL", what);
  failures += !condition;
}

struct Problem {
  at::Tensor x = at::randn({4, 5, 6, 3}, at::kDouble);         // [N, C, H, W]
  at::Tensor gate = at::rand({5}, at::kDouble);                // [C]
  at::Tensor weight = at::randn({5}, at::kDouble);             // [C]
  at::Tensor bias = at::randn({5}, at::kDouble);               // [C]
  at::Tensor residual = at::randn({4, 5, 6, 3}, at::kDouble);  // as x

  at::Tensor pre_activation() const {
    const auto per_channel = [](const at::Tensor& t) { return t.view({1, -1, 1, 1}); };
    const at::Tensor mean = x.mean({0, 2, 3}, true);
    const at::Tensor var = (x - mean).square().mean({0, 2, 3}, true);
    const at::Tensor normal = (x - mean) / (var + 1e-5).sqrt();
    return per_channel(gate) * (per_channel(weight) * normal + per_channel(bias)) + residual;
  }
};

void test_forward() {
  const Problem p;
  const auto [y, mean, var, aux] =
      pfs::bn_gate_act_cpu(p.x, p.gate, p.weight, p.bias, p.residual, {}, {}, true, 1e-5, "relu");
  expect(at::allclose(y, at::relu(p.pre_activation()), 1e-12, 1e-12),
         "bn_gate_act equals the formula");
  expect(at::allclose(mean, p.x.mean({0, 2, 3}), 1e-12, 1e-12), "bn_gate_act returns the mean");
  expect(aux.numel() == (p.x.numel() + 7) / 8, "bn_gate_act packs one bit per value");
}

void test_backward() {
  const Problem p;
  const auto [y, mean, var, aux] =
      pfs::bn_gate_act_cpu(p.x, p.gate, p.weight, p.bias, p.residual, {}, {}, true, 1e-5, "relu");
  const at::Tensor grad_y = at::randn_like(y);
  const auto [grad_x, grad_gate, grad_weight, grad_bias, grad_residual] =
      pfs::bn_gate_act_backward_cpu(grad_y, p.x, mean, var, p.gate, p.weight, p.bias, aux, true,
                                    1e-5, "relu", true, {true, true, true, true, true});
  const at::Tensor g = grad_y * (p.pre_activation() > 0);
  const at::Tensor s1 = g.sum({0, 2, 3});
  expect(at::allclose(grad_bias, p.gate * s1, 1e-11, 1e-11),
         "backward gives the gradient of the bias");
  expect(at::allclose(grad_residual, g, 1e-12, 1e-12),
         "backward gives the gradient of the residual");
  expect(
      at::allclose(p.gate * grad_gate, p.weight * grad_weight + p.bias * grad_bias, 1e-11, 1e-11),
      "the gradients of gate, weight and bias belong together");
  expect(grad_x.sum({0, 2, 3}).abs().max().item<double>() < 1e-10,
         "the gradient of x sums to 0 per channel");
}

void test_dispatcher() {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("pfs_fast::frozen_conv", "")
                      .typed<at::Tensor(const at::Tensor&, const at::Tensor&,
                                        const std::optional<at::Tensor>&, c10::SymIntArrayRef,
                                        c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt)>();
  const at::Tensor x = at::randn({2, 4, 7, 7});
  const at::Tensor weight = at::randn({6, 2, 3, 3});
  const std::vector<c10::SymInt> two{2, 2}, one{1, 1};
  const at::Tensor y = op.call(x, weight, {}, two, one, one, 2);
  expect(at::allclose(y, at::conv2d(x, weight, {}, {2, 2}, {1, 1}, {1, 1}, 2)),
         "frozen_conv is a convolution");
}

void test_gate_step() {
  at::Tensor gates = at::tensor({0.5, 1e-3, 1.0}, at::kDouble);
  const at::Tensor grad = at::tensor({1.0, 1.0, -1.0}, at::kDouble);
  at::Tensor exp_avg = at::zeros_like(gates), exp_avg_sq = at::zeros_like(gates);
  at::Tensor step = at::zeros({1}, at::kLong), died_at = at::full({3}, -1, at::kInt);
  pfs::gate_step_cpu(gates, grad, exp_avg, exp_avg_sq, step, died_at, 0.01, 0.9, 0.999, 1e-8, 0.0,
                     0.5, 3);
  expect(at::allclose(gates, at::tensor({0.49, 0.0, 1.0}, at::kDouble), 1e-6, 1e-6),
         "gate_step_ moves by lr and clamps");
  expect(at::equal(died_at, at::tensor({-1, 1, -1}, at::kInt)),
         "gate_step_ notes when a gate died");
}

void test_errors() {
  std::string message;
  try {
    pfs::bn_gate_act_cpu(at::randn({2, 3}), at::ones({4}), {}, {}, {}, {}, {}, true, 1e-5, "relu");
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  }
  expect(message.find("gate must have shape [C] with C = 3") != std::string::npos,
         "a wrong gate is refused by name");
}

}  // namespace

int main() {
  at::manual_seed(0);
  std::printf("instruction set: %s\n", pfs::cpu_isa());
  test_forward();
  test_backward();
  test_dispatcher();
  test_gate_step();
  test_errors();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
