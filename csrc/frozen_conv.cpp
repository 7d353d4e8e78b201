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

void check_options(const char* op, const at::Tensor& weight, int64_t dims, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() == dims, op, ": weight must have ", dims,
                    " dimensions [C_out, C_in / groups, *kernel], got ", weight.sizes(),
                    "; it must belong to a convolution of this many spatial dimensions");
  const auto check_list = [&](const char* name, at::IntArrayRef values, int64_t least) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == dims - 2, op, ": ", name,
                      " must have one value per spatial dimension (", dims - 2, "), got ", values,
                      "; pass one number or one for each");
    for (const int64_t value : values) {
      TORCH_CHECK_VALUE(value >= least, op, ": ", name, " must be at least ", least, ", got ",
                        values, "; correct it");
    }
  };
  check_list("stride", stride, 1);
  check_list("padding", padding, 0);
  check_list("dilation", dilation, 1);
  TORCH_CHECK_VALUE(groups >= 1 && weight.size(0) % groups == 0, op,
                    ": groups must be at least 1 and divide the output channels, ", weight.size(0),
                    ", got ", groups, "; correct it");
}

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
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 5, op,
                    ": x must have 3 to 5 dimensions [N, C, *spatial], got shape ", x.sizes(),
                    "; add the batch dimension");
  check_options(op, weight, x.dim(), stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(x.size(1) == weight.size(1) * groups, op, ": x must have ",
                    weight.size(1) * groups, " channels (weight.size(1) * groups), got ", x.size(1),
                    "; weight and x do not belong together");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op,
                   ": weight must have the dtype of x, ", x.scalar_type(), ", got ",
                   weight.scalar_type(), "; cast the frozen weight once");
  checks::check_same_device(op, "weight", weight, x);
  if (checks::is_present(bias)) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op,
                      ": bias must have shape [C_out] with C_out = ", weight.size(0),
                      " (weight.size(0)), got ", bias->sizes(),
                      "; pass one value per output channel");
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), op,
                     ": bias must have the dtype of x, ", x.scalar_type(), ", got ",
                     bias->scalar_type(), "; cast the frozen bias once");
    checks::check_same_device(op, "bias", *bias, x);
  }
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
  TORCH_CHECK_VALUE(dims >= 3 && dims <= 5 && grad_y.dim() == dims, op,
                    ": grad_y must have the dimensions of the input, ", input_size, ", got shape ",
                    grad_y.sizes(), "; pass the gradient of frozen_conv's output");
  check_options(op, weight, dims, stride, padding, dilation, groups);
  TORCH_CHECK_TYPE(weight.scalar_type() == grad_y.scalar_type(), op,
                   ": weight must have the dtype of grad_y, ", grad_y.scalar_type(), ", got ",
                   weight.scalar_type(), "; use one dtype");
  checks::check_same_device(op, "weight", weight, grad_y, "grad_y");
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
  TORCH_CHECK_VALUE(grad_x.sizes() == input_size, op,
                    ": input_size must be the shape that frozen_conv had, got ", input_size,
                    " where grad_y leads to ", grad_x.sizes(), "; pass x.shape");
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
