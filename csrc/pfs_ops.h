// Every operator of pfs_fast: one signature per backend, with the shape of each tensor.
//
// N = batch, C = channels, M = values per channel = N * prod(spatial), G = gates.
// acc = float64 if x is float64, else float32.
// layout(x) = x.suggest_memory_format(): contiguous or channels_last (2d, 3d). x, residual and
// grad_y of other strides are made contiguous in layout(x) first; y, aux and the gradients of x and
// residual are in layout(x). The functions check their arguments themselves (checks.h), because
// under inference_mode nothing else would.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace pfs {

using OptionalTensor = std::optional<at::Tensor>;

// y = act(gate * (weight * (x - mean) / sqrt(var + eps) + bias) + residual), rounded once to the
// dtype of x. training: mean and var are those of the batch (var biased); otherwise copies of
// running_mean and running_var. M = 0 when training: mean and var are 0. The reduction does not
// depend on the number of threads.
using BnGateActOutputs = std::tuple<at::Tensor,   // y     [N, C, *spatial], dtype of x, layout(x)
                                    at::Tensor,   // mean  [C], acc
                                    at::Tensor,   // var   [C], acc
                                    at::Tensor>;  // aux   see AuxKind in activation.h

BnGateActOutputs bn_gate_act_cpu(
    const at::Tensor& x,         // [N, C, *spatial], 2 to 5 dimensions; float32, bfloat16, float64
    const OptionalTensor& gate,  // [C], acc; absent = 1
    const OptionalTensor& weight,        // [C], acc; absent = 1
    const OptionalTensor& bias,          // [C], acc; absent = 0
    const OptionalTensor& residual,      // as x; absent = 0
    const OptionalTensor& running_mean,  // [C], acc; read only if !training
    const OptionalTensor& running_var,   // [C], acc; read only if !training
    bool training, double eps, std::string_view act);

BnGateActOutputs bn_gate_act_cuda(
    const at::Tensor& x,                 // [N, C, *spatial]; float32, bfloat16, float16, float64
    const OptionalTensor& gate,          // [C], acc
    const OptionalTensor& weight,        // [C], acc
    const OptionalTensor& bias,          // [C], acc
    const OptionalTensor& residual,      // as x
    const OptionalTensor& running_mean,  // [C], acc
    const OptionalTensor& running_var,   // [C], acc
    bool training, double eps, std::string_view act);

// With g = grad_y * act'(z), S1 = sum g, S2 = sum g * xhat per channel:
//   grad_gate = weight * S2 + bias * S1,  grad_weight = gate * S2,  grad_bias = gate * S1,
//   grad_residual = g, grad_x = gate * weight * rstd * (g - S1 / M - xhat * S2 / M)  if training,
//   else  gate * weight * rstd * g.
// output_mask: which of (x, gate, weight, bias, residual) want a gradient; the others are empty
// tensors [0].
using BnGateActGrads =
    std::tuple<at::Tensor,   // grad_x         [N, C, *spatial], dtype of x, layout(x)
               at::Tensor,   // grad_gate      [C], acc
               at::Tensor,   // grad_weight    [C], acc
               at::Tensor,   // grad_bias      [C], acc
               at::Tensor>;  // grad_residual  [N, C, *spatial], dtype of x, layout(x)

BnGateActGrads bn_gate_act_backward_cpu(
    const at::Tensor& grad_y,      // [N, C, *spatial], dtype of x, any strides
    const at::Tensor& x,           // [N, C, *spatial]
    const at::Tensor& mean,        // [C], acc; of the forward pass
    const at::Tensor& var,         // [C], acc; of the forward pass
    const OptionalTensor& gate,    // [C], acc
    const OptionalTensor& weight,  // [C], acc
    const OptionalTensor& bias,    // [C], acc
    const at::Tensor& aux,         // of the forward pass
    bool training, double eps, std::string_view act, bool has_residual,
    std::array<bool, 5> output_mask);

BnGateActGrads bn_gate_act_backward_cuda(const at::Tensor& grad_y,      // [N, C, *spatial]
                                         const at::Tensor& x,           // [N, C, *spatial]
                                         const at::Tensor& mean,        // [C], acc
                                         const at::Tensor& var,         // [C], acc
                                         const OptionalTensor& gate,    // [C], acc
                                         const OptionalTensor& weight,  // [C], acc
                                         const OptionalTensor& bias,    // [C], acc
                                         const at::Tensor& aux,         // of the forward pass
                                         bool training, double eps, std::string_view act,
                                         bool has_residual, std::array<bool, 5> output_mask);

// Convolution (1d, 2d, 3d) whose weight and bias get no gradient, so that its input need not be
// kept. Any device.
at::Tensor frozen_conv(          // [N, C_out, *spatial_out]
    const at::Tensor& x,         // [N, C_in, *spatial]
    const at::Tensor& weight,    // [C_out, C_in / groups, *kernel], dtype of x
    const OptionalTensor& bias,  // [C_out], dtype of x
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

at::Tensor frozen_conv_backward(  // grad_x [N, C_in, *spatial] = input_size, in the layout of
                                  // grad_y and weight
    const at::Tensor& grad_y,     // [N, C_out, *spatial_out]
    const at::Tensor& weight,     // [C_out, C_in / groups, *kernel]
    at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups);

// frozen_conv of a 3x3 kernel with stride 1 on the CPU, by Winograd's minimal filtering
// F(tile x tile, 3x3): the same sums with 2.25 (tile 2) or 4 (tile 4) times fewer products, rounded
// otherwise. In bfloat16 the sums are float32, rounded once. The result does not depend on the
// number of threads.
at::Tensor winograd_conv(      // [N, C_out, H + 2 padding[0] - 2, W + 2 padding[1] - 2], layout(x)
    const at::Tensor& x,       // [N, C_in, H, W], float32 or bfloat16
    const at::Tensor& weight,  // [C_out, C_in, 3, 3], dtype of x
    const OptionalTensor& bias,  // [C_out], dtype of x
    at::IntArrayRef padding,     // two values in [0, 2]
    int64_t tile);               // 2 or 4

at::Tensor winograd_conv_backward(  // grad_x [N, C_in, H, W], layout(grad_y)
    const at::Tensor& grad_y,       // [N, C_out, H_out, W_out], float32 or bfloat16
    const at::Tensor& weight,       // [C_out, C_in, 3, 3], dtype of grad_y
    at::IntArrayRef padding, int64_t tile);

// Maximum over windows, dilation 1, sizes rounded down: max_pool2d of PyTorch, the first of equal
// maxima and the last of several NaN included. What is kept for the backward pass is a byte a
// value: row * kernel[1] + column of the maximum in its window.
using MaxPoolOutputs = std::tuple<at::Tensor,   // y        [N, C, H_out, W_out], layout(x)
                                  at::Tensor>;  // offsets  [N, C, H_out, W_out], uint8, layout(x)

MaxPoolOutputs max_pool_cpu(  // H_out = (H + 2 padding[0] - kernel[0]) / stride[0] + 1, W_out alike
    const at::Tensor& x,      // [N, C, H, W]; float32, bfloat16, float64
    at::IntArrayRef kernel,   // two values of at least 1, at most 255 taps
    at::IntArrayRef stride,   // two values of at least 1
    at::IntArrayRef padding);  // two values in [0, kernel / 2]; padding is -infinity

MaxPoolOutputs max_pool_cuda(const at::Tensor& x,  // also float16
                             at::IntArrayRef kernel, at::IntArrayRef stride,
                             at::IntArrayRef padding);

// Gradients add up where windows overlap, in float32 at least and in the order of the output;
// offsets that lie outside their window or the image are left out.
at::Tensor max_pool_backward_cpu(  // grad_x [N, C, H, W] = input_size, layout(offsets)
    const at::Tensor& grad_y,      // [N, C, H_out, W_out]
    const at::Tensor& offsets,     // of the forward pass
    at::IntArrayRef input_size, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding);

at::Tensor max_pool_backward_cuda(const at::Tensor& grad_y, const at::Tensor& offsets,
                                  at::IntArrayRef input_size, at::IntArrayRef kernel,
                                  at::IntArrayRef stride, at::IntArrayRef padding);

// bn_gate_act(winograd_conv(x, conv_weight, conv_bias), ...) with the statistics of the batch, in
// channels_last. The result does not depend on the number of threads.
using ConvBnGateActOutputs = std::tuple<at::Tensor,   // y     [N, C, H_out, W_out]
                                        at::Tensor,   // u     [N, C, H_out, W_out], convolved
                                        at::Tensor,   // mean  [C]
                                        at::Tensor,   // var   [C]
                                        at::Tensor>;  // aux   see AuxKind in activation.h

ConvBnGateActOutputs conv_bn_gate_act_cpu(
    const at::Tensor& x,              // [N, C_in, H, W], float32 or bfloat16
    const at::Tensor& conv_weight,    // [C, C_in, 3, 3], dtype of x
    const OptionalTensor& conv_bias,  // [C], dtype of x
    const OptionalTensor& gate,       // [C], float32; absent = 1
    const OptionalTensor& weight,     // [C], float32; absent = 1
    const OptionalTensor& bias,       // [C], float32; absent = 0
    const OptionalTensor& residual,   // as y; absent = 0
    at::IntArrayRef padding,          // two values in [0, 2]
    int64_t tile,                     // 2 or 4
    double eps, std::string_view act);

// As bn_gate_act's gradients, but that of x, [N, C_in, H, W], to which grad_branch is added.
BnGateActGrads conv_bn_gate_act_backward_cpu(
    const at::Tensor& grad_y,       // [N, C, H_out, W_out], any strides
    const at::Tensor& u,            // [N, C, H_out, W_out], of the forward pass
    const at::Tensor& mean,         // [C], of the forward pass
    const at::Tensor& var,          // [C], of the forward pass
    const at::Tensor& conv_weight,  // [C, C_in, 3, 3]
    const OptionalTensor& gate,     // [C]
    const OptionalTensor& weight,   // [C]
    const OptionalTensor& bias,     // [C]
    const at::Tensor& aux,          // of the forward pass
    at::IntArrayRef padding, int64_t tile, double eps, std::string_view act, bool has_residual,
    std::array<bool, 5> output_mask,
    const OptionalTensor& grad_branch);  // [N, C_in, H, W], any strides; read if x wants a gradient

// One step on all gates, in place: step += 1; grad + the regulariser's gradient 2 gamma (m -
// target) / num_gates * sign(gates), m = sum |gates| / num_gates; Adam (bias corrections in
// double); clamp to [0, 1], NaN stays NaN; died_at = step where a gate has just become 0 and -1
// where it is above 0. num_gates may be larger than G: gates removed at 0 still count.
void gate_step_cpu(at::Tensor& gates,       // [G], float32 or float64, contiguous
                   const at::Tensor& grad,  // [G], dtype of gates
                   at::Tensor& exp_avg,     // [G], dtype of gates, contiguous
                   at::Tensor& exp_avg_sq,  // [G], dtype of gates, contiguous
                   at::Tensor& step,        // [1], int64
                   at::Tensor& died_at,     // [G], int32, contiguous; -1 = alive
                   double lr, double beta1, double beta2, double eps, double gamma, double target,
                   int64_t num_gates);

void gate_step_cuda(         // never synchronises with the host: step is read on the device
    at::Tensor& gates,       // [G]
    const at::Tensor& grad,  // [G]
    at::Tensor& exp_avg,     // [G]
    at::Tensor& exp_avg_sq,  // [G]
    at::Tensor& step,        // [1]
    at::Tensor& died_at,     // [G]
    double lr, double beta1, double beta2, double eps, double gamma, double target,
    int64_t num_gates);

// Instruction set of the CPU kernels in this process: "avx512", "avx2" or "baseline". The best one
// that the processor has, or the one that the environment variable PFS_FAST_CPU_ISA names; throws
// if that one cannot run here.
const char* cpu_isa();

}  // namespace pfs
