// All schemas on one page. Each kernel file ends with the TORCH_LIBRARY_IMPL block of its backend,
// autograd.cpp with that of the gradients; fake kernels and autocast are registered in Python
// (pfs_fast/ops/_registration.py).
#include <torch/library.h>

TORCH_LIBRARY(pfs_fast, m) {
  // Where torch.compile in a fresh process finds the Python half of the registration.
  m.set_python_module("pfs_fast.ops._registration");

  m.def(
      "bn_gate_act(Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? "
      "running_mean, "
      "Tensor? running_var, bool training, float eps, str act) -> (Tensor y, Tensor mean, Tensor "
      "var, Tensor aux)");
  m.def(
      "_bn_gate_act_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor var, Tensor? gate, "
      "Tensor? weight, Tensor? bias, "
      "Tensor aux, bool training, float eps, str act, bool has_residual, bool[5] output_mask) -> "
      "(Tensor grad_x, Tensor grad_gate, Tensor grad_weight, Tensor grad_bias, Tensor "
      "grad_residual)");
  m.def(
      "frozen_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, "
      "SymInt groups) -> Tensor");
  m.def(
      "_frozen_conv_backward(Tensor grad_y, Tensor weight, SymInt[] input_size, SymInt[] stride, "
      "SymInt[] padding, "
      "SymInt[] dilation, SymInt groups) -> Tensor");
  m.def(
      "winograd_conv(Tensor x, Tensor weight, Tensor? bias, SymInt[] padding, int tile) -> Tensor");
  m.def(
      "_winograd_conv_backward(Tensor grad_y, Tensor weight, SymInt[] padding, int tile) -> "
      "Tensor");
  m.def(
      "max_pool(Tensor x, int[2] kernel, int[2] stride, int[2] padding) -> (Tensor y, Tensor "
      "offsets)");
  m.def(
      "_max_pool_backward(Tensor grad_y, Tensor offsets, SymInt[] input_size, int[2] kernel, "
      "int[2] stride, int[2] padding) -> Tensor");
  m.def(
      "conv_bn_gate_act(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? gate, Tensor? "
      "weight, Tensor? bias, Tensor? residual, SymInt[] padding, int tile, float eps, str act) -> "
      "(Tensor y, Tensor u, Tensor mean, Tensor var, Tensor aux)");
  // The same, and x for its other readers: their gradient is then added where that of x is made.
  m.def(
      "conv_bn_gate_act_branch(Tensor(a) x, Tensor conv_weight, Tensor? conv_bias, Tensor? gate, "
      "Tensor? weight, Tensor? bias, Tensor? residual, SymInt[] padding, int tile, float eps, str "
      "act) -> (Tensor y, Tensor u, Tensor mean, Tensor var, Tensor aux, Tensor(a) branch)");
  m.def(
      "_conv_bn_gate_act_backward(Tensor grad_y, Tensor u, Tensor mean, Tensor var, Tensor "
      "conv_weight, Tensor? gate, Tensor? weight, Tensor? bias, Tensor aux, SymInt[] padding, int "
      "tile, float eps, str act, bool has_residual, bool[5] output_mask, Tensor? grad_branch=None) -> "
      "(Tensor grad_x, Tensor grad_gate, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "gate_step_(Tensor(a!) gates, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) step, "
      "Tensor(e!) died_at, float lr, float beta1, float beta2, float eps, float gamma, float "
      "target, int num_gates) -> ()");
}
