// bn_gate_act on the CPU: checks, allocation, threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../pfs_ops.h"
#include "bn_gate_act_parts.h"
#include "isa.h"
#include "kept_memory.h"

namespace pfs {

const char* cpu_isa() { return cpu::chosen_isa().name; }

namespace {

using cpu::Affine;
using cpu::Channels;
using cpu::Expanded;
using cpu::ForwardArgs;
using cpu::Layout;
using cpu::NormBackward;
using cpu::read_channels;
using cpu::write_channels;

// x: contiguous in the layout that it suggests.
at::Tensor empty_like(const at::Tensor& x) {
  return cpu::empty(x.sizes(), x.scalar_type(), x.suggest_memory_format());
}

at::Tensor make_aux(const at::Tensor& x, AuxKind kind) {
  if (kind == AuxKind::kPreAct) return empty_like(x);
  return cpu::empty({kind == AuxKind::kBitmask ? (x.numel() + 7) / 8 : 0}, at::kByte,
                    at::MemoryFormat::Contiguous);
}

}  // namespace

BnGateActOutputs bn_gate_act_cpu(const at::Tensor& x_in, const OptionalTensor& gate,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, bool training, double eps,
                                 std::string_view act_name) {
  const Act act = checks::check_bn_gate_act(x_in, gate, weight, bias, residual, running_mean,
                                            running_var, training, eps, act_name);
  const bool has_residual = checks::is_present(residual);
  const auto format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const at::TensorOptions acc = x.options().dtype(checks::acc_type(x));
  const int64_t num_channels = x.size(1);
  const cpu::DtypeKernels& kernels = cpu::norm_kernels(x.scalar_type());
  const Layout layout = cpu::make_layout(x, kernels.tile);

  at::Tensor y = empty_like(x);
  at::Tensor aux = make_aux(x, aux_kind(act, has_residual));
  cpu::Moments moments{Channels(num_channels, 0.0), Channels(num_channels, 0.0)};
  if (!training) {
    moments.mean = read_channels(running_mean, num_channels, 0);
    moments.var = read_channels(running_var, num_channels, 0);
  } else if (layout.numel > 0) {
    moments = cpu::batch_moments(kernels, layout, x.const_data_ptr());
  }
  const at::Tensor mean_out = write_channels(moments.mean, acc);
  const at::Tensor var_out = write_channels(moments.var, acc);
  if (layout.numel == 0) return {y, mean_out, var_out, aux};

  const at::Tensor added = has_residual ? residual->contiguous(format) : at::Tensor();
  const Affine affine = cpu::make_affine(
      read_channels(var_out, num_channels, 0), read_channels(gate, num_channels, 1),
      read_channels(weight, num_channels, 1), read_channels(bias, num_channels, 0), eps);
  const Expanded means(kernels, layout, moments.mean, acc);
  const Expanded scale(kernels, layout, affine.scale, acc);
  const Expanded shift(kernels, layout, affine.shift, acc);
  const ForwardArgs args{x.const_data_ptr(),    has_residual ? added.const_data_ptr() : nullptr,
                         means.get(),           scale.get(),
                         shift.get(),           y.mutable_data_ptr(),
                         aux.mutable_data_ptr()};
  const auto kernel = kernels.forward[static_cast<int>(act)][has_residual ? 1 : 0];
  cpu::for_each_chunk_backwards(
      layout, [&](int64_t begin, int64_t end) { kernel(layout, args, begin, end); });
  return {y, mean_out, var_out, aux};
}

BnGateActGrads bn_gate_act_backward_cpu(const at::Tensor& grad_y_in, const at::Tensor& x_in,
                                        const at::Tensor& mean, const at::Tensor& var,
                                        const OptionalTensor& gate, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const at::Tensor& aux_in,
                                        bool training, double eps, std::string_view act_name,
                                        bool has_residual, std::array<bool, 5> output_mask) {
  const Act act = checks::check_bn_gate_act_backward(grad_y_in, x_in, mean, var, gate, weight, bias,
                                                     aux_in, act_name, has_residual);
  const auto format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const at::Tensor aux =
      aux_kind(act, has_residual) == AuxKind::kPreAct ? aux_in.contiguous(format) : aux_in;
  const auto [wants_x, wants_gate, wants_weight, wants_bias, wants_residual] = output_mask;
  const bool sums = wants_gate || wants_weight || wants_bias || (wants_x && training);
  const at::Tensor grad_y = grad_y_in.contiguous(format);
  const NormBackward backward(grad_y, x, mean, var, gate, weight, bias, aux, act, has_residual,
                              training, eps, sums);

  // A copy of the gradient, as of one that is the same at all pixels, becomes a result in place: by
  // rows each value is read and then written, once. By planes a tile reaches into the next plane.
  const bool in_place = backward.layout().period > 0 &&
                        grad_y.const_data_ptr() != grad_y_in.const_data_ptr();
  const auto absent = [&] { return at::empty({0}, x.options()); };
  const at::Tensor grad_residual = !wants_residual ? absent() : in_place ? grad_y : empty_like(x);
  const at::Tensor grad_x =
      !wants_x ? absent() : in_place && !wants_residual ? grad_y : empty_like(x);
  if (x.numel() > 0 && (wants_x || wants_residual)) {
    void* to_x = wants_x ? grad_x.mutable_data_ptr() : nullptr;
    void* to_residual = wants_residual ? grad_residual.mutable_data_ptr() : nullptr;
    cpu::for_each_chunk_backwards(backward.layout(), [&](int64_t begin, int64_t end) {
      backward.apply(begin, end, to_x, to_residual);
    });
  }
  const auto wanted = [&](bool wants, const Channels& values) {
    const at::TensorOptions acc = x.options().dtype(checks::acc_type(x));
    return wants ? write_channels(values, acc) : at::empty({0}, acc);
  };
  return {grad_x, wanted(wants_gate, backward.grad_gate()),
          wanted(wants_weight, backward.grad_weight()), wanted(wants_bias, backward.grad_bias()),
          grad_residual};
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("bn_gate_act", &pfs::bn_gate_act_cpu);
  m.impl("_bn_gate_act_backward", &pfs::bn_gate_act_backward_cpu);
}
