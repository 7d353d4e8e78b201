// Argument checks of all operators, and the only home of their error texts:
// "<op>: <argument> must <rule>, got <value>; <repair>". What is no argument of an operator (the
// environment, a second derivative, a tape) is checked where it is used.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>

#include "activation.h"
#include "pool_shape.h"

namespace pfs::checks {

inline Act parse_act(const char* op, std::string_view act) {
  if (act == "identity") return Act::kIdentity;
  if (act == "relu") return Act::kRelu;
  if (act == "relu6") return Act::kRelu6;
  if (act == "silu") return Act::kSilu;
  if (act == "hardswish") return Act::kHardswish;
  TORCH_CHECK_VALUE(false, op,
                    ": act must be one of identity, relu, relu6, silu, hardswish, got \"",
                    std::string(act), "\"; use \"identity\" and apply the activation afterwards");
}

inline at::ScalarType acc_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_supported_dtype(at::ScalarType type, bool is_cuda) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 ||
         (is_cuda && type == at::kHalf);
}

inline int64_t values_per_channel(const at::Tensor& x) {
  int64_t count = x.size(0);
  for (int64_t d = 2; d < x.dim(); ++d) count *= x.size(d);
  return count;
}

inline void check_x(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.dim() <= 5, op,
                    ": x must have 2 to 5 dimensions [N, C, *spatial], got shape ", x.sizes(),
                    "; reshape it");
  TORCH_CHECK_TYPE(is_supported_dtype(x.scalar_type(), x.is_cuda()), op, ": x must be float32, ",
                   x.is_cuda() ? "float16, " : "", "bfloat16 or float64 on ", x.device().type(),
                   ", got ", x.scalar_type(), "; convert it");
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& t,
                              const at::Tensor& x, const char* x_name = "x") {
  TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", name, " must be on the device of ", x_name,
                    " (", x.device(), "), got ", t.device(), "; move it there");
}

inline void check_per_channel(const char* op, const char* name, const std::optional<at::Tensor>& t,
                              const at::Tensor& x) {
  if (!t.has_value() || !t->defined()) return;
  const int64_t num_channels = x.size(1);
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == num_channels, op, ": ", name,
                    " must have shape [C] with C = ", num_channels, " (x.size(1)), got ",
                    t->sizes(), "; pass one value per channel");
  TORCH_CHECK_TYPE(t->scalar_type() == acc_type(x), op, ": ", name, " must be ", acc_type(x),
                   " for x of ", x.scalar_type(), ", got ", t->scalar_type(), "; convert it");
  check_same_device(op, name, *t, x);
}

inline void check_like_x(const char* op, const char* name, const at::Tensor& t,
                         const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), op, ": ", name, " must have the shape of x, ",
                    x.sizes(), ", got ", t.sizes(), "; nothing is broadcast");
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": ", name,
                   " must have the dtype of x, ", x.scalar_type(), ", got ", t.scalar_type(),
                   "; convert it");
  check_same_device(op, name, t, x);
}

inline bool is_present(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

// Checks everything that bn_gate_act takes; returns the activation.
inline Act check_bn_gate_act(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                             const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& residual,
                             const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_var, bool training,
                             double eps, std::string_view act, const char* op = "bn_gate_act") {
  check_x(op, x);
  check_per_channel(op, "gate", gate, x);
  check_per_channel(op, "weight", weight, x);
  check_per_channel(op, "bias", bias, x);
  check_per_channel(op, "running_mean", running_mean, x);
  check_per_channel(op, "running_var", running_var, x);
  if (is_present(residual)) check_like_x(op, "residual", *residual, x);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, op, ": eps must be finite and at least 0, got ",
                    eps, "; the usual value is 1e-5");
  if (training) {
    TORCH_CHECK_VALUE(values_per_channel(x) != 1 || x.size(1) == 0, op,
                      ": x must have more than 1 value per channel when training, got shape ",
                      x.sizes(), "; use a larger batch or training=False");
  } else {
    TORCH_CHECK_VALUE(is_present(running_mean), op,
                      ": running_mean must be given when training is False, got None; pass it or "
                      "set training=True");
    TORCH_CHECK_VALUE(is_present(running_var), op,
                      ": running_var must be given when training is False, got None; pass it or "
                      "set training=True");
  }
  return parse_act(op, act);
}

// Checks everything that _bn_gate_act_backward takes; returns the activation.
inline Act check_bn_gate_act_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                      const at::Tensor& mean, const at::Tensor& var,
                                      const std::optional<at::Tensor>& gate,
                                      const std::optional<at::Tensor>& weight,
                                      const std::optional<at::Tensor>& bias, const at::Tensor& aux,
                                      std::string_view act, bool has_residual,
                                      const char* op = "_bn_gate_act_backward") {
  check_x(op, x);
  check_like_x(op, "grad_y", grad_y, x);
  check_per_channel(op, "mean", mean, x);
  check_per_channel(op, "var", var, x);
  check_per_channel(op, "gate", gate, x);
  check_per_channel(op, "weight", weight, x);
  check_per_channel(op, "bias", bias, x);
  const Act parsed = parse_act(op, act);
  check_same_device(op, "aux", aux, x);
  switch (aux_kind(parsed, has_residual)) {
    case AuxKind::kNone:
      break;
    case AuxKind::kBitmask:
      TORCH_CHECK_VALUE(aux.scalar_type() == at::kByte && aux.is_contiguous() &&
                            aux.numel() == (x.numel() + 7) / 8,
                        op, ": aux must be the bitmask of the forward pass, uint8 of ",
                        (x.numel() + 7) / 8, " bytes, got ", aux.scalar_type(), " of shape ",
                        aux.sizes(), "; pass what bn_gate_act returned");
      break;
    case AuxKind::kPreAct:
      check_like_x(op, "aux", aux, x);
      break;
  }
  return parsed;
}

// Checks a convolution's bias: one value per output channel of weight, dtype and device of x.
inline void check_conv_bias(const char* op, const std::optional<at::Tensor>& bias,
                            const at::Tensor& weight, const at::Tensor& x) {
  if (!is_present(bias)) return;
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op,
                    ": bias must have shape [C_out] with C_out = ", weight.size(0),
                    " (weight.size(0)), got ", bias->sizes(), "; pass one value per output channel");
  TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), op, ": bias must have the dtype of x, ",
                   x.scalar_type(), ", got ", bias->scalar_type(), "; cast the frozen bias once");
  check_same_device(op, "bias", *bias, x);
}

// Checks that a frozen weight has the dtype and device of x.
inline void check_conv_weight(const char* op, const at::Tensor& weight, const char* x_name,
                              const at::Tensor& x) {
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": weight must have the dtype of ",
                   x_name, ", ", x.scalar_type(), ", got ", weight.scalar_type(),
                   "; cast the frozen weight once");
  check_same_device(op, "weight", weight, x, x_name);
}

inline void check_conv_options(const char* op, const at::Tensor& weight, int64_t dims,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups) {
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

inline void check_frozen_conv(const char* op, const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 5, op,
                    ": x must have 3 to 5 dimensions [N, C, *spatial], got shape ", x.sizes(),
                    "; add the batch dimension");
  check_conv_options(op, weight, x.dim(), stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(x.size(1) == weight.size(1) * groups, op, ": x must have ",
                    weight.size(1) * groups, " channels (weight.size(1) * groups), got ", x.size(1),
                    "; weight and x do not belong together");
  check_conv_weight(op, weight, "x", x);
  check_conv_bias(op, bias, weight, x);
}

inline void check_frozen_conv_gradient(const char* op, const at::Tensor& grad_y,
                                       const at::Tensor& weight, at::IntArrayRef input_size,
                                       at::IntArrayRef stride, at::IntArrayRef padding,
                                       at::IntArrayRef dilation, int64_t groups) {
  const int64_t dims = static_cast<int64_t>(input_size.size());
  TORCH_CHECK_VALUE(dims >= 3 && dims <= 5 && grad_y.dim() == dims, op,
                    ": grad_y must have the dimensions of the input, ", input_size, ", got shape ",
                    grad_y.sizes(), "; pass the gradient of frozen_conv's output");
  check_conv_options(op, weight, dims, stride, padding, dilation, groups);
  check_conv_weight(op, weight, "grad_y", grad_y);
}

// grad_x: what grad_y and the options lead to.
inline void check_input_size(const char* op, at::IntArrayRef input_size, const at::Tensor& grad_x) {
  TORCH_CHECK_VALUE(grad_x.sizes() == input_size, op,
                    ": input_size must be the shape that frozen_conv had, got ", input_size,
                    " where grad_y leads to ", grad_x.sizes(), "; pass x.shape");
}

inline void check_tile(const char* op, int64_t tile) {
  TORCH_CHECK_VALUE(tile == 2 || tile == 4, op, ": tile must be 2 or 4, got ", tile,
                    "; frozen_conv convolves directly");
}

inline void check_winograd_image(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 4, op, ": ", name,
                    " must have 4 dimensions [N, C, H, W], got shape ", t.sizes(),
                    "; use frozen_conv for others");
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, op, ": ", name,
                   " must be float32 or bfloat16, got ", t.scalar_type(),
                   "; use frozen_conv for other dtypes");
}

inline void check_winograd_weight(const char* op, const at::Tensor& weight, const char* x_name,
                                  const at::Tensor& x, int64_t channel_dim,
                                  at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
                    ": weight must have shape [C_out, C_in, 3, 3], got ", weight.sizes(),
                    "; use frozen_conv for other kernels");
  TORCH_CHECK_VALUE(x.size(1) == weight.size(channel_dim), op, ": ", x_name, " must have ",
                    weight.size(channel_dim), " channels (weight.size(", channel_dim, ")), got ",
                    x.size(1), "; weight and ", x_name, " do not belong together");
  check_conv_weight(op, weight, x_name, x);
  TORCH_CHECK_VALUE(padding.size() == 2, op, ": padding must have two values, got ", padding,
                    "; pass one for each spatial dimension");
  for (const int64_t value : padding) {
    TORCH_CHECK_VALUE(value >= 0 && value <= 2, op, ": padding must lie in [0, 2], got ", padding,
                      "; use frozen_conv for more");
  }
}

inline void check_winograd_input(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, at::IntArrayRef padding) {
  check_winograd_image(op, "x", x);
  check_winograd_weight(op, weight, "x", x, 1, padding);
  for (int64_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(x.size(d + 2) + 2 * padding[d] >= 3, op,
                      ": x must be at least 3 high and wide with its padding, got shape ",
                      x.sizes(), " and padding ", padding, "; pad it");
  }
  check_conv_bias(op, bias, weight, x);
}

inline void check_winograd_gradient(const char* op, const at::Tensor& grad_y,
                                    const at::Tensor& weight, at::IntArrayRef padding) {
  check_winograd_image(op, "grad_y", grad_y);
  check_winograd_weight(op, weight, "grad_y", grad_y, 0, padding);
  for (int64_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(grad_y.size(d + 2) + 2 >= 2 * padding[d], op,
                      ": grad_y must be as large as the output for this padding, ", padding,
                      ", got shape ", grad_y.sizes(),
                      "; pass the gradient of winograd_conv's output");
  }
}

// u: output of the convolution, as conv_bn_gate_act returned it.
inline void check_conv_bn_output(const char* op, const at::Tensor& u) {
  TORCH_CHECK_VALUE(u.dim() == 4 && u.is_contiguous(at::MemoryFormat::ChannelsLast), op,
                    ": u must be dense in channels_last, got strides ", u.strides(),
                    "; pass what conv_bn_gate_act returned");
}

inline void check_grad_branch(const char* op, const at::Tensor& grad_branch,
                              const at::Tensor& grad_x, const at::Tensor& grad_y) {
  TORCH_CHECK_VALUE(grad_branch.sizes() == grad_x.sizes(), op,
                    ": grad_branch must have the shape of x, ", grad_x.sizes(), ", got ",
                    grad_branch.sizes(), "; pass the gradient of x's other use");
  TORCH_CHECK_TYPE(grad_branch.scalar_type() == grad_x.scalar_type(), op,
                   ": grad_branch must have the dtype of grad_y, ", grad_x.scalar_type(), ", got ",
                   grad_branch.scalar_type(), "; cast it");
  check_same_device(op, "grad_branch", grad_branch, grad_y, "grad_y");
}

inline void check_gate_vector(const char* name, const at::Tensor& t, const at::Tensor& gates,
                              at::ScalarType type, bool contiguous) {
  constexpr const char* op = "gate_step_";
  TORCH_CHECK_VALUE(t.sizes() == gates.sizes(), op, ": ", name,
                    " must have shape [G] with G = ", gates.numel(), " (gates.numel()), got ",
                    t.sizes(), "; one value per gate");
  TORCH_CHECK_TYPE(t.scalar_type() == type, op, ": ", name, " must be ", type, ", got ",
                   t.scalar_type(), "; convert it");
  TORCH_CHECK_VALUE(!contiguous || t.is_contiguous(), op, ": ", name,
                    " must be contiguous, got strides ", t.strides(),
                    "; it is changed in place, keep it as a flat vector");
  check_same_device(op, name, t, gates, "gates");
}

inline void check_gate_step(const at::Tensor& gates, const at::Tensor& grad,
                            const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                            const at::Tensor& step, const at::Tensor& died_at, double lr,
                            double beta1, double beta2, double eps, double gamma, double target,
                            int64_t num_gates) {
  constexpr const char* op = "gate_step_";
  TORCH_CHECK_VALUE(gates.dim() == 1, op, ": gates must have shape [G], got ", gates.sizes(),
                    "; flatten them");
  TORCH_CHECK_TYPE(gates.scalar_type() == at::kFloat || gates.scalar_type() == at::kDouble, op,
                   ": gates must be float32 or float64, got ", gates.scalar_type(),
                   "; convert them");
  check_gate_vector("gates", gates, gates, gates.scalar_type(), true);
  check_gate_vector("grad", grad, gates, gates.scalar_type(), false);
  check_gate_vector("exp_avg", exp_avg, gates, gates.scalar_type(), true);
  check_gate_vector("exp_avg_sq", exp_avg_sq, gates, gates.scalar_type(), true);
  check_gate_vector("died_at", died_at, gates, at::kInt, true);
  TORCH_CHECK_VALUE(step.numel() == 1 && step.scalar_type() == at::kLong, op,
                    ": step must be one int64 value [1], got ", step.scalar_type(), " of shape ",
                    step.sizes(), "; use torch.zeros(1, dtype=torch.int64)");
  check_same_device(op, "step", step, gates, "gates");
  TORCH_CHECK_VALUE(std::isfinite(lr) && lr >= 0, op, ": lr must be finite and at least 0, got ",
                    lr, "; the paper's value is 0.01");
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, op,
                    ": betas must lie in [0, 1), got (", beta1, ", ", beta2,
                    "); the usual values are (0.9, 0.999)");
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, op, ": eps must be finite and at least 0, got ",
                    eps, "; the usual value is 1e-8");
  TORCH_CHECK_VALUE(std::isfinite(gamma), op, ": gamma must be finite, got ", gamma,
                    "; the paper's value is 0.5");
  TORCH_CHECK_VALUE(std::isfinite(target), op, ": target must be finite, got ", target,
                    "; use the share of gates to keep");
  TORCH_CHECK_VALUE(num_gates >= gates.numel() && (num_gates > 0 || gates.numel() == 0), op,
                    ": num_gates must be at least the number of gates, ", gates.numel(), ", got ",
                    num_gates, "; count all gates, also those already removed");
}

inline void check_pool_pair(const char* op, const char* name, at::IntArrayRef values,
                            int64_t least) {
  TORCH_CHECK_VALUE(values.size() == 2, op, ": ", name, " must have two values, got ", values,
                    "; pass one for each spatial dimension");
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= least, op, ": ", name, " must be at least ", least, ", got ", values,
                      "; correct it");
  }
}

// Checks the options of a max_pool of input_size [N, C, H, W]; returns its sizes.
inline PoolShape check_pool(const char* op, const char* name, at::IntArrayRef input_size,
                            at::IntArrayRef kernel, at::IntArrayRef stride,
                            at::IntArrayRef padding) {
  constexpr int64_t kMaxTaps = 255, kMaxStep = int64_t{1} << 31;
  TORCH_CHECK_VALUE(input_size.size() == 4, op, ": ", name,
                    " must have 4 dimensions [N, C, H, W], got shape ", input_size,
                    "; add the batch dimension");
  check_pool_pair(op, "kernel", kernel, 1);
  check_pool_pair(op, "stride", stride, 1);
  check_pool_pair(op, "padding", padding, 0);
  TORCH_CHECK_VALUE(
      kernel[0] <= kMaxTaps && kernel[1] <= kMaxTaps && kernel[0] * kernel[1] <= kMaxTaps, op,
      ": kernel must have at most ", kMaxTaps, " values, got ", kernel,
      "; use torch.nn.functional.max_pool2d for larger windows");
  for (size_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(stride[d] <= kMaxStep, op, ": stride must be at most ", kMaxStep, ", got ",
                      stride, "; correct it");
    TORCH_CHECK_VALUE(padding[d] <= kernel[d] / 2, op, ": padding must be at most half of kernel, ",
                      kernel, ", got ", padding, "; pad with torch.nn.functional.pad");
    TORCH_CHECK_VALUE(input_size[d + 2] >= 1 && input_size[d + 2] + 2 * padding[d] >= kernel[d], op,
                      ": ", name, " must be at least as high and wide as kernel, ", kernel,
                      ", with its padding, ", padding, ", got shape ", input_size,
                      "; use a smaller kernel");
  }
  const auto pooled = [&](size_t d) {
    return (input_size[d + 2] + 2 * padding[d] - kernel[d]) / stride[d] + 1;
  };
  return {input_size[0], input_size[1], input_size[2], input_size[3], pooled(0),  pooled(1),
          kernel[0],     kernel[1],     stride[0],     stride[1],     padding[0], padding[1]};
}

inline PoolShape check_max_pool(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                                at::IntArrayRef padding) {
  constexpr const char* op = "max_pool";
  const PoolShape shape = check_pool(op, "x", x.sizes(), kernel, stride, padding);
  check_x(op, x);
  return shape;
}

inline PoolShape check_max_pool_backward(const at::Tensor& grad_y, const at::Tensor& offsets,
                                         at::IntArrayRef input_size, at::IntArrayRef kernel,
                                         at::IntArrayRef stride, at::IntArrayRef padding) {
  constexpr const char* op = "_max_pool_backward";
  for (const int64_t size : input_size) {
    TORCH_CHECK_VALUE(size >= 0, op, ": input_size must be at least 0, got ", input_size,
                      "; pass x.shape");
  }
  const PoolShape shape = check_pool(op, "input_size", input_size, kernel, stride, padding);
  TORCH_CHECK_TYPE(is_supported_dtype(grad_y.scalar_type(), grad_y.is_cuda()), op,
                   ": grad_y must have the dtype of x, got ", grad_y.scalar_type(),
                   "; pass the gradient of max_pool's output");
  const auto check_shape = [&](const char* name, const at::Tensor& t) {
    const std::array<int64_t, 4> wanted{shape.batch, shape.channels, shape.out_height,
                                        shape.out_width};
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(wanted), op, ": ", name,
                      " must have the shape of max_pool's output, ", at::IntArrayRef(wanted),
                      ", got ", t.sizes(), "; pass what belongs to input_size ", input_size);
  };
  check_shape("grad_y", grad_y);
  check_shape("offsets", offsets);
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kByte, op, ": offsets must be uint8, got ",
                   offsets.scalar_type(), "; pass what max_pool returned");
  check_same_device(op, "offsets", offsets, grad_y, "grad_y");
  return shape;
}

}  // namespace pfs::checks
