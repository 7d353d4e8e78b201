// _bn_gate_act_backward on CUDA: arguments, workspace and launches of the kernels in
// bn_gate_act_backward.cuh. A file of its own so that the two halves compile side by side.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <type_traits>

#include "../pfs_ops.h"
#include "bn_gate_act_backward.cuh"
#include "tensors.cuh"

namespace pfs {
namespace {

using namespace pfs::cuda;

struct Backward {
  const DeviceScope& scope;
  Shape shape;
  Act act;
  AuxKind aux_kind;
  bool training;
  double eps;
  at::Tensor grad_y, x, mean, var, aux;
  Params params;
  std::array<bool, 5> output_mask;
  at::Tensor grad_x, grad_gate, grad_weight, grad_bias, grad_residual;

  bool aligned() const {
    const void* saved = aux_kind == AuxKind::kPreAct ? raw(aux) : nullptr;
    return is_aligned({raw(grad_y), raw(x), saved, raw(grad_x), raw(grad_residual)});
  }

  // Sums where anything needs them, then per-channel gradients; returns the coefficients [5, C] of
  // apply.
  template <typename T, Source kSource>
  at::Tensor statistics() const {
    using acc = acc_t<T>;
    const int64_t channels = shape.channels;
    const bool needs_sums =
        (training && output_mask[0]) || output_mask[1] || output_mask[2] || output_mask[3];
    const at::Tensor coefficients = at::empty({kNumGradRows, channels}, mean.options());
    at::Tensor partial;
    int64_t splits = 0;
    if (needs_sums) {
      dispatch_layout<kPackSize<T>>(shape, aligned(), [&](auto layout, auto pack) {
        constexpr int V = decltype(pack)::value;
        const Grid grid = make_grid(shape, V);
        splits = grid.splits;
        partial = at::empty({2, splits, channels}, mean.options());
        launch(scope, grad_sums_kernel<T, V, decltype(layout)::value, kSource>, grid.tiles,
               grid.splits, grid.threads(), typed<T>(grad_y), typed<T>(x), raw(aux),
               typed<acc>(mean), typed<acc>(var), params.pointers<acc>(), static_cast<acc>(eps),
               act_params<acc>(act), grid, typed_mutable<acc>(partial));
      });
    }
    const ChannelGrads<acc> grads{typed_mutable<acc>(grad_gate), typed_mutable<acc>(grad_weight),
                                  typed_mutable<acc>(grad_bias)};
    launch(scope, channel_grads_kernel<acc>, channel_blocks(channels), 1,
           kChannelThreads * kSplitThreads, typed<acc>(partial), splits, shape, typed<acc>(mean),
           typed<acc>(var), params.pointers<acc>(), training, static_cast<acc>(eps), grads,
           typed_mutable<acc>(coefficients));
    return coefficients;
  }

  template <typename T, Source kSource>
  void apply(const at::Tensor& coefficients) const {
    using acc = acc_t<T>;
    dispatch_layout<kPackSize<T>>(shape, aligned(), [&](auto layout, auto pack) {
      constexpr int V = decltype(pack)::value;
      const Grid grid = make_grid(shape, V);
      launch(scope, apply_backward_kernel<T, V, decltype(layout)::value, kSource>, grid.tiles,
             grid.splits, grid.threads(), typed<T>(grad_y), typed<T>(x), raw(aux),
             typed<acc>(coefficients), act_params<acc>(act), training, grid,
             typed_mutable<T>(grad_x), typed_mutable<T>(grad_residual));
    });
  }

  template <typename T, Source kSource>
  void run() const {
    const at::Tensor coefficients = statistics<T, kSource>();
    if (output_mask[0] || output_mask[4]) apply<T, kSource>(coefficients);
  }

  template <typename T>
  void run() const {
    switch (aux_kind) {
      case AuxKind::kBitmask:
        return run<T, Source::kMask>();
      case AuxKind::kPreAct:
        return run<T, Source::kPreAct>();
      case AuxKind::kNone:
        return act_family(act) == ActFamily::kSmooth ? run<T, Source::kSmooth>()
                                                     : run<T, Source::kClamp>();
    }
  }
};

}  // namespace

BnGateActGrads bn_gate_act_backward_cuda(const at::Tensor& grad_y, const at::Tensor& x,
                                         const at::Tensor& mean, const at::Tensor& var,
                                         const OptionalTensor& gate, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const at::Tensor& aux,
                                         bool training, double eps, std::string_view act,
                                         bool has_residual, std::array<bool, 5> output_mask) {
  const Act parsed = checks::check_bn_gate_act_backward(grad_y, x, mean, var, gate, weight, bias,
                                                        aux, act, has_residual);
  const DeviceScope scope(x.device());
  const at::MemoryFormat format = x.suggest_memory_format();
  const auto channel_options = x.options().dtype(checks::acc_type(x));
  const bool is_empty = x.numel() == 0;

  const auto like_x = [&](bool wanted) {
    return wanted ? at::empty(x.sizes(), x.options(), format) : at::empty({0}, x.options());
  };
  const auto per_channel = [&](bool wanted) {
    const int64_t size = wanted ? x.size(1) : 0;
    return is_empty ? at::zeros({size}, channel_options) : at::empty({size}, channel_options);
  };
  BnGateActGrads grads{like_x(output_mask[0]), per_channel(output_mask[1]),
                       per_channel(output_mask[2]), per_channel(output_mask[3]),
                       like_x(output_mask[4])};
  if (is_empty) return grads;

  const AuxKind kind = aux_kind(parsed, has_residual);
  const Backward backward{scope,
                          shape_of(x, format),
                          parsed,
                          kind,
                          training,
                          eps,
                          grad_y.contiguous(format),
                          x.contiguous(format),
                          mean.contiguous(),
                          var.contiguous(),
                          kind == AuxKind::kPreAct ? aux.contiguous(format) : aux,
                          {dense(gate), dense(weight), dense(bias)},
                          output_mask,
                          std::get<0>(grads),
                          std::get<1>(grads),
                          std::get<2>(grads),
                          std::get<3>(grads),
                          std::get<4>(grads)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(),
                                  "_bn_gate_act_backward", [&] { backward.run<scalar_t>(); });
  return grads;
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CUDA, m) {
  m.impl("_bn_gate_act_backward", &pfs::bn_gate_act_backward_cuda);
}
