// The parts of bn_gate_act on the CPU that operators put together: statistics of the batch, and the
// two passes of the gradient. The arithmetic is in bn_gate_act_kernel_impl.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../pfs_ops.h"
#include "bn_gate_act_kernel.h"
#include "bn_gate_act_plan.h"

namespace pfs::cpu {

using Channels = std::vector<double>;  // [C]

const DtypeKernels& norm_kernels(at::ScalarType type);

Channels read_channels(const OptionalTensor& values, int64_t num_channels, double absent);

// Rounds to the dtype of the accumulators.
at::Tensor write_channels(const Channels& values, const at::TensorOptions& acc);

// What the kernels read per channel, in the form they want.
class Expanded {
 public:
  Expanded() = default;
  Expanded(const DtypeKernels& kernels, const Layout& layout, const Channels& values,
           const at::TensorOptions& acc);
  const void* get() const { return data_.get(); }

 private:
  c10::DataPtr data_;
};

// z = (x - mean) * scale + shift. Forward and backward both start from the rounded mean and var,
// and so agree on z to the bit.
struct Affine {
  Channels rstd, scale, shift;
};
Affine make_affine(const Channels& var, const Channels& gate, const Channels& weight,
                   const Channels& bias, double eps);

struct Moments {
  Channels mean, var;
};

// Means and sums of squared deviations of parts of a tensor, part after part.
struct Partials {
  std::vector<double> first, second;  // [num_parts, C]
};

// counts: values per channel in each part.
Moments merge_moments(const Partials& partials, const std::vector<int64_t>& counts,
                      int64_t num_channels);
Moments batch_moments(const DtypeKernels& kernels, const Layout& layout, const void* x);

// The gradient of one call: sums over the batch when it is made, then the gradients of x and
// residual for any ranges of values.
class NormBackward {
 public:
  // grad_y, x: dense in one layout. sums: whether the sums are needed. by_rows: x is in channels_last,
  // also where its strides would allow another name.
  NormBackward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
               const at::Tensor& var, const OptionalTensor& gate, const OptionalTensor& weight,
               const OptionalTensor& bias, const at::Tensor& aux, Act act, bool has_residual,
               bool training, double eps, bool sums, bool by_rows = false);

  const Layout& layout() const { return layout_; }

  // Values [begin, end): by rows, begin is a multiple of channels * inner. Null: not wanted. Value i
  // goes to element i of each.
  void apply(int64_t begin, int64_t end, void* grad_x, void* grad_residual) const;

  Channels grad_gate() const;
  Channels grad_weight() const;
  Channels grad_bias() const;

 private:
  void add_up();

  const DtypeKernels& kernels_;
  Layout layout_;
  SlopeSource source_;
  at::TensorOptions acc_;
  at::Tensor grad_y_, x_, aux_;
  Channels gate_, weight_, bias_;
  Affine affine_;
  Channels sum_g_, sum_gx_;
  Expanded mean_, scale_, shift_, centred_factor_, offset_;
  BackwardArgs args_{};
};

}  // namespace pfs::cpu
