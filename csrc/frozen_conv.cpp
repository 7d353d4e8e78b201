// Convolution with constant weights. The arithmetic is PyTorch's but for small float32 kernels on the
// CPU (direct_conv.h); what is ours everywhere is that its input is not kept.
#include <ATen/ops/convolution.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "cpu/direct_conv.h"
#include "pfs_ops.h"

namespace pfs {
namespace {

// Whether grad_y has the shape of the output for input_size.
bool has_output_of(const at::Tensor& grad_y, const at::Tensor& weight, at::IntArrayRef input_size,
                   at::IntArrayRef stride, at::IntArrayRef padding) {
  bool same = grad_y.size(0) == input_size[0] && grad_y.size(0) > 0 &&
              grad_y.size(1) == weight.size(0) && input_size[1] == weight.size(1);
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t reached = input_size[d + 2] + 2 * padding[d] - weight.size(d + 2);
    same = same && reached >= 0 && grad_y.size(d + 2) == reached / stride[d] + 1;
  }
  return same;
}

// Whether a kernel fits into the padded image; where it does not, PyTorch says so.
bool fits(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding) {
  return x.size(2) + 2 * padding[0] >= weight.size(2) && x.size(3) + 2 * padding[1] >= weight.size(3);
}

}  // namespace

at::Tensor frozen_conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       int64_t groups) {
  constexpr const char* op = "frozen_conv";
  checks::check_frozen_conv(op, x, weight, bias, stride, padding, dilation, groups);
  if (x.size(0) > 0 && cpu::direct_conv_serves(x, weight, stride, dilation, groups) &&
      fits(x, weight, padding)) {
    return cpu::direct_conv(x, weight, bias, stride, padding);
  }
  const std::vector<int64_t> no_output_padding(stride.size(), 0);
  return at::convolution(x, weight, bias, stride, padding, dilation, /*transposed=*/false,
                         no_output_padding, groups);
}

// The gradient for the input is the transposed convolution of grad_y. at::convolution_backward
// gives the same numbers in the same time, but wants an input tensor: here there is none, and a
// stand-in would have to be allocated in full.
at::Tensor frozen_conv_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                at::IntArrayRef input_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  constexpr const char* op = "_frozen_conv_backward";
  const int64_t dims = static_cast<int64_t>(input_size.size());
  checks::check_frozen_conv_gradient(op, grad_y, weight, input_size, stride, padding, dilation,
                                     groups);
  if (dims == 4 && cpu::direct_conv_serves(grad_y, weight, stride, dilation, groups) &&
      has_output_of(grad_y, weight, input_size, stride, padding)) {
    return cpu::direct_conv_backward(grad_y, weight, input_size, stride, padding);
  }
  // Rows at the end that a stride > 1 steps over are in the input, but in no window.
  std::vector<int64_t> output_padding;
  for (int64_t d = 0; d < dims - 2; ++d) {
    const int64_t reached = (grad_y.size(d + 2) - 1) * stride[d] - 2 * padding[d] +
                            dilation[d] * (weight.size(d + 2) - 1) + 1;
    output_padding.push_back(input_size[d + 2] - reached);
  }
  const at::Tensor grad_x = at::convolution(grad_y, weight, /*bias=*/{}, stride, padding, dilation,
                                            /*transposed=*/true, output_padding, groups);
  checks::check_input_size(op, input_size, grad_x);
  return grad_x.contiguous(grad_y.suggest_memory_format());
}

}  // namespace pfs

// PyTorch's convolution runs on either device: both keys, also where no CUDA kernel of ours is
// compiled.
TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("frozen_conv", TORCH_FN(pfs::frozen_conv));
  m.impl("_frozen_conv_backward", TORCH_FN(pfs::frozen_conv_backward));
}

TORCH_LIBRARY_IMPL(pfs_fast, CUDA, m) {
  m.impl("frozen_conv", TORCH_FN(pfs::frozen_conv));
  m.impl("_frozen_conv_backward", TORCH_FN(pfs::frozen_conv_backward));
}
