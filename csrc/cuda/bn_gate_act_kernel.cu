// bn_gate_act on CUDA: arguments, workspace and launches of the kernels in bn_gate_act_forward.cuh.
// Nothing here waits for the device, so that a call may be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <type_traits>

#include "../pfs_ops.h"
#include "bn_gate_act_forward.cuh"
#include "tensors.cuh"

namespace pfs {
namespace {

using namespace pfs::cuda;

struct Forward {
  const DeviceScope& scope;
  Shape shape;
  Act act;
  bool training;
  double eps;
  at::Tensor x, residual, running_mean,
      running_var;  // dense; residual and running_* may be undefined
  Params params;
  at::Tensor y, mean, var, aux;

  // Moments, then per-channel coefficients [3, C].
  template <typename T>
  at::Tensor statistics() const {
    using acc = acc_t<T>;
    const int64_t channels = shape.channels;
    const at::Tensor affine = at::empty({kNumAffineRows, channels}, mean.options());
    at::Tensor partial;
    Grid grid = make_grid(shape, 1);
    if (training) {
      dispatch_layout<kPackSize<T>>(shape, is_aligned({raw(x)}), [&](auto layout, auto pack) {
        constexpr int V = decltype(pack)::value;
        grid = make_grid(shape, V);
        partial = at::empty({2, grid.splits, channels}, mean.options());
        launch(scope, batch_moments_kernel<T, V, decltype(layout)::value>, grid.tiles, grid.splits,
               grid.threads(), typed<T>(x), grid, typed_mutable<acc>(partial));
      });
    }
    launch(scope, channel_affine_kernel<T>, channel_blocks(channels), 1,
           kChannelThreads * kSplitThreads, typed<T>(x), grid, typed<acc>(partial),
           typed<acc>(running_mean), typed<acc>(running_var), params.pointers<acc>(), training,
           static_cast<acc>(eps), typed_mutable<acc>(mean), typed_mutable<acc>(var),
           typed_mutable<acc>(affine));
    return affine;
  }

  template <typename T, Epilogue kEpilogue>
  void apply(const at::Tensor& affine) const {
    using acc = acc_t<T>;
    constexpr bool kMask = kEpilogue == Epilogue::kClampResidualMask;
    constexpr int kPack = kMask && !std::is_same_v<T, double> ? 8 : kPackSize<T>;
    const bool aligned = is_aligned({raw(x), raw(residual), raw(y), raw(aux)});
    const auto act_values = act_params<acc>(act);
    if constexpr (kMask) {
      if (!aligned || kPack != 8 || run_length(shape) % kPack != 0) {
        constexpr int64_t kMaxBlocks = 1056 * 4;
        const int64_t blocks = std::min((aux.numel() + kMaxThreads - 1) / kMaxThreads, kMaxBlocks);
        launch(scope, apply_masked_flat_kernel<T>, blocks, 1, kMaxThreads, typed<T>(x),
               typed<T>(residual), typed<acc>(affine), act_values, shape, typed_mutable<T>(y),
               typed_mutable<uint8_t>(aux));
        return;
      }
    }
    dispatch_layout<kPack>(shape, aligned, [&](auto layout, auto pack) {
      constexpr int V = decltype(pack)::value;
      if constexpr (!kMask || V == 8) {
        const Grid grid = make_grid(shape, V);
        launch(scope, apply_kernel<T, V, decltype(layout)::value, kEpilogue>, grid.tiles,
               grid.splits, grid.threads(), typed<T>(x), typed<T>(residual), typed<acc>(affine),
               act_values, grid, typed_mutable<T>(y),
               aux.numel() > 0 ? aux.mutable_data_ptr() : nullptr);
      }
    });
  }

  template <typename T>
  void run() const {
    const at::Tensor affine = statistics<T>();
    const bool smooth = act_family(act) == ActFamily::kSmooth;
    if (!residual.defined()) {
      smooth ? apply<T, Epilogue::kSmooth>(affine) : apply<T, Epilogue::kClamp>(affine);
    } else if (smooth) {
      apply<T, Epilogue::kSmoothResidual>(affine);
    } else if (act == Act::kIdentity) {
      apply<T, Epilogue::kClampResidual>(affine);
    } else {
      apply<T, Epilogue::kClampResidualMask>(affine);
    }
  }
};

at::Tensor make_aux(const at::Tensor& x, const at::Tensor& y, AuxKind kind,
                    at::MemoryFormat format) {
  const auto bytes = x.options().dtype(at::kByte);
  switch (kind) {
    case AuxKind::kBitmask:
      return at::empty({(x.numel() + 7) / 8}, bytes);
    case AuxKind::kPreAct:
      return at::empty(y.sizes(), y.options(), format);
    default:
      return at::empty({0}, bytes);
  }
}

}  // namespace

BnGateActOutputs bn_gate_act_cuda(const at::Tensor& x, const OptionalTensor& gate,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, bool training, double eps,
                                  std::string_view act) {
  const Act parsed = checks::check_bn_gate_act(x, gate, weight, bias, residual, running_mean,
                                               running_var, training, eps, act);
  const DeviceScope scope(x.device());
  const at::MemoryFormat format = x.suggest_memory_format();
  const auto channel_options = x.options().dtype(checks::acc_type(x));
  const bool has_residual = checks::is_present(residual);

  const at::Tensor y = at::empty(x.sizes(), x.options(), format);
  const at::Tensor aux = make_aux(x, y, aux_kind(parsed, has_residual), format);
  if (x.numel() == 0) {
    const auto statistic = [&](const OptionalTensor& running) {
      return training ? at::zeros({x.size(1)}, channel_options) : running->clone();
    };
    return {y, statistic(running_mean), statistic(running_var), aux};
  }
  const Forward forward{scope,
                        shape_of(x, format),
                        parsed,
                        training,
                        eps,
                        x.contiguous(format),
                        has_residual ? residual->contiguous(format) : at::Tensor(),
                        training ? at::Tensor() : dense(running_mean),
                        training ? at::Tensor() : dense(running_var),
                        {dense(gate), dense(weight), dense(bias)},
                        y,
                        at::empty({x.size(1)}, channel_options),
                        at::empty({x.size(1)}, channel_options),
                        aux};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bn_gate_act",
                                  [&] { forward.run<scalar_t>(); });
  return {forward.y, forward.mean, forward.var, forward.aux};
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CUDA, m) { m.impl("bn_gate_act", &pfs::bn_gate_act_cuda); }
