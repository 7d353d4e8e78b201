// 3x3 convolutions of stride 1 by Winograd's minimal filtering: the operator and its checks.
#include <torch/library.h>

#include "../checks.h"
#include "../pfs_ops.h"
#include "isa.h"
#include "kept_memory.h"
#include "winograd_pass.h"

namespace pfs {
namespace {

using cpu::WinogradKernels;

at::Tensor channels_last(const at::Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

// x [N, C_in, H, W] -> [N, C_out, H + 2 pad_y - 2, W + 2 pad_x - 2], in the layout of x. weight:
// [C_out, C_in, 3, 3], or [C_in, C_out, 3, 3] if reversed.
at::Tensor convolve(const WinogradKernels& kernels, const at::Tensor& x_in,
                    const at::Tensor& weight_in, const float* bias, int64_t pad_y, int64_t pad_x,
                    bool reversed) {
  const at::Tensor x = channels_last(x_in), weight = channels_last(weight_in);
  const cpu::WinogradShape shape =
      cpu::winograd_shape(kernels, x.size(0), x.size(1), x.size(2), x.size(3),
                          weight.size(reversed ? 1 : 0), pad_y, pad_x, reversed);
  const at::Tensor y =
      cpu::empty({shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 x.scalar_type(), at::MemoryFormat::ChannelsLast);
  cpu::run_winograd(
      {kernels, shape, x.const_data_ptr(), weight.const_data_ptr(), bias, y.mutable_data_ptr()});
  return y.contiguous(x_in.suggest_memory_format());
}

}  // namespace

at::Tensor winograd_conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         at::IntArrayRef padding, int64_t tile) {
  constexpr const char* op = "winograd_conv";
  checks::check_winograd_input(op, x, weight, bias, padding);
  const WinogradKernels& kernels = cpu::winograd_kernels(op, tile, x.scalar_type());
  const at::Tensor dense_bias =
      checks::is_present(bias) ? bias->to(at::kFloat).contiguous() : at::Tensor();
  return convolve(kernels, x, weight,
                  dense_bias.defined() ? dense_bias.const_data_ptr<float>() : nullptr, padding[0],
                  padding[1], /*reversed=*/false);
}

at::Tensor winograd_conv_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                  at::IntArrayRef padding, int64_t tile) {
  constexpr const char* op = "_winograd_conv_backward";
  checks::check_winograd_gradient(op, grad_y, weight, padding);
  return convolve(cpu::winograd_kernels(op, tile, grad_y.scalar_type()), grad_y, weight, nullptr, 2 - padding[0],
                  2 - padding[1], /*reversed=*/true);
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("winograd_conv", &pfs::winograd_conv);
  m.impl("_winograd_conv_backward", &pfs::winograd_conv_backward);
}
