// Direct float32 convolutions of channels_last images with small kernels, and their input gradients:
// where oneDNN is slow, which is at few channels and at strides, and for 1x1 kernels, where it is no
// faster and its output is not of kept memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "../pfs_ops.h"

namespace pfs::cpu {

// Whether direct_conv and its gradient are the faster ones for a weight of this size, for float32
// images in channels_last. weight_size: [C_out, C_in / groups, *kernel].
bool direct_conv_pays(at::IntArrayRef weight_size, at::IntArrayRef stride,
                      at::IntArrayRef dilation, int64_t groups);

// Whether they are for this image, x or grad_y, and this weight.
bool direct_conv_serves(const at::Tensor& image, const at::Tensor& weight, at::IntArrayRef stride,
                        at::IntArrayRef dilation, int64_t groups);

// Arguments as of frozen_conv, already checked. -> [N, C_out, H_out, W_out], channels_last.
at::Tensor direct_conv(const at::Tensor& x,         // [N, C_in, H, W], float32
                       const at::Tensor& weight,    // [C_out, C_in, *kernel], float32
                       const OptionalTensor& bias,  // [C_out], float32
                       at::IntArrayRef stride, at::IntArrayRef padding);

at::Tensor direct_conv_backward(  // grad_x [N, C_in, H, W] = input_size, channels_last
    const at::Tensor& grad_y,     // [N, C_out, H_out, W_out], float32
    const at::Tensor& weight,     // [C_out, C_in, *kernel], float32
    at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding);

}  // namespace pfs::cpu
