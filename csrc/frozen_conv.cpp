// Convolution with constant weights. The arithmetic is PyTorch's; what is ours is that its input is
// not kept.
#include <ATen/ops/convolution.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
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
