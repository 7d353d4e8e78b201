#include "bn_gate_act_parts.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "isa.h"
#include "kept_memory.h"

namespace pfs::cpu {
namespace {

SlopeSource slope_source(Act act, bool has_residual) {
  switch (aux_kind(act, has_residual)) {
    case AuxKind::kBitmask:
      return SlopeSource::kBitmask;
    case AuxKind::kPreAct:
      return act == Act::kSilu ? SlopeSource::kSavedSilu : SlopeSource::kSavedHardswish;
    case AuxKind::kNone:
      break;
  }
  return static_cast<SlopeSource>(act);
}

template <class Rows, class Planes>
Partials run_reduction(const Layout& layout, const ReductionPlan& plan, int64_t scratch_units,
                       const Rows& rows, const Planes& planes) {
  Partials partials{std::vector<double>(plan.num_partials() * layout.channels),
                    std::vector<double>(plan.num_partials() * layout.channels)};
  share_out(plan.num_chunks(), [&](SharedBlocks::Share& share) {
    Scratch scratch(scratch_units * layout.unit);
    for (int64_t chunk; (chunk = share.next()) >= 0;) {
      double* out1 = partials.first.data() + plan.partial(chunk) * layout.channels;
      double* out2 = partials.second.data() + plan.partial(chunk) * layout.channels;
      if (layout.period > 0) {
        rows(plan.begin(chunk), plan.end(chunk), out1, out2, scratch.get());
      } else {
        planes(plan.planes(chunk), out1, out2);
      }
    }
  });
  return partials;
}

}  // namespace

const DtypeKernels& norm_kernels(at::ScalarType type) {
  const Dtype dtype = type == at::kDouble  ? Dtype::kDouble
                           : type == at::kFloat ? Dtype::kFloat
                                                : Dtype::kBFloat16;
  return chosen_isa().kernels->of[static_cast<int>(dtype)];
}

Channels read_channels(const OptionalTensor& values, int64_t num_channels, double absent) {
  Channels out(num_channels, absent);
  if (!values.has_value() || !values->defined()) return out;
  const at::Tensor dense = values->contiguous();
  if (dense.scalar_type() == at::kDouble) {
    std::copy_n(dense.const_data_ptr<double>(), num_channels, out.begin());
  } else {
    std::copy_n(dense.const_data_ptr<float>(), num_channels, out.begin());
  }
  return out;
}

at::Tensor write_channels(const Channels& values, const at::TensorOptions& acc) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, acc);
  if (out.scalar_type() == at::kDouble) {
    std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  } else {
    std::transform(values.begin(), values.end(), out.mutable_data_ptr<float>(),
                   [](double value) { return static_cast<float>(value); });
  }
  return out;
}

Expanded::Expanded(const DtypeKernels& kernels, const Layout& layout, const Channels& values,
                   const at::TensorOptions& acc)
    : data_(c10::GetCPUAllocator()->allocate(
          (layout.period > 0 ? layout.period : layout.channels) * acc.dtype().itemsize())) {
  kernels.expand(layout, values.data(), data_.get());
}

Affine make_affine(const Channels& var, const Channels& gate, const Channels& weight,
                   const Channels& bias, double eps) {
  const size_t num_channels = var.size();
  Affine affine{Channels(num_channels), Channels(num_channels), Channels(num_channels)};
  for (size_t c = 0; c < num_channels; ++c) {
    affine.rstd[c] = 1 / std::sqrt(var[c] + eps);
    affine.scale[c] = gate[c] * weight[c] * affine.rstd[c];
    affine.shift[c] = gate[c] * bias[c];
  }
  return affine;
}

// Around the mean of the first part (Chan et al. 1979, without its divisions).
Moments merge_moments(const Partials& partials, const std::vector<int64_t>& counts,
                      int64_t num_channels) {
  Moments moments{Channels(num_channels, 0.0), Channels(num_channels, 0.0)};
  auto& [mean, var] = moments;
  Channels shift(num_channels, 0.0);
  double total = 0;
  for (size_t p = 0; p < counts.size(); ++p) {
    const double n = static_cast<double>(counts[p]);
    total += n;
    const double* means = partials.first.data() + p * num_channels;
    const double* m2s = partials.second.data() + p * num_channels;
    for (int64_t c = 0; c < num_channels; ++c) {
      const double delta = means[c] - partials.first[c];
      shift[c] += n * delta;
      var[c] += m2s[c] + n * delta * delta;
    }
  }
  for (int64_t c = 0; c < num_channels; ++c) {
    mean[c] = partials.first[c] + shift[c] / total;
    var[c] = (var[c] - shift[c] * shift[c] / total) / total;
    if (var[c] < 0) var[c] = 0;
  }
  return moments;
}

Moments batch_moments(const DtypeKernels& kernels, const Layout& layout, const void* x) {
  const ReductionPlan plan(layout);
  const Partials partials = run_reduction(
      layout, plan, 6,
      [&](int64_t begin, int64_t end, double* m, double* m2, double* scratch) {
        kernels.stats_rows(layout, x, begin, end, m, m2, scratch);
      },
      [&](const PlaneRange& range, double* m, double* m2) {
        kernels.stats_planes(layout, x, range, m, m2);
      });
  std::vector<int64_t> counts;
  for (int64_t p = 0; p < plan.num_partials(); ++p) counts.push_back(plan.count(p));
  return merge_moments(partials, counts, layout.channels);
}

NormBackward::NormBackward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                           const at::Tensor& var, const OptionalTensor& gate,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const at::Tensor& aux, Act act, bool has_residual, bool training,
                           double eps, bool sums, bool by_rows)
    : kernels_(norm_kernels(x.scalar_type())),
      layout_(by_rows ? make_rows_layout(x, kernels_.tile) : make_layout(x, kernels_.tile)),
      source_(slope_source(act, has_residual)),
      acc_(x.options().dtype(checks::acc_type(x))),
      grad_y_(grad_y),
      x_(x),
      aux_(aux),
      gate_(read_channels(gate, x.size(1), 1)),
      weight_(read_channels(weight, x.size(1), 1)),
      bias_(read_channels(bias, x.size(1), 0)),
      affine_(make_affine(read_channels(var, x.size(1), 0), gate_, weight_, bias_, eps)),
      sum_g_(x.size(1), 0.0),
      sum_gx_(x.size(1), 0.0) {
  if (layout_.numel == 0) return;
  mean_ = Expanded(kernels_, layout_, read_channels(mean, layout_.channels, 0), acc_);
  scale_ = Expanded(kernels_, layout_, affine_.scale, acc_);
  shift_ = Expanded(kernels_, layout_, affine_.shift, acc_);
  args_.grad_y = grad_y_.const_data_ptr();
  args_.x = x_.const_data_ptr();
  args_.aux = aux_.const_data_ptr();
  args_.mean = mean_.get();
  args_.scale = scale_.get();
  args_.shift = shift_.get();
  args_.training = training;
  if (sums) add_up();
  const double count = static_cast<double>(layout_.numel / layout_.channels);
  Channels centred_factor(layout_.channels), offset(layout_.channels);
  for (int64_t c = 0; c < layout_.channels; ++c) {
    centred_factor[c] =
        -affine_.scale[c] * affine_.rstd[c] * affine_.rstd[c] * (sum_gx_[c] / count);
    offset[c] = -affine_.scale[c] * (sum_g_[c] / count);
  }
  centred_factor_ = Expanded(kernels_, layout_, centred_factor, acc_);
  offset_ = Expanded(kernels_, layout_, offset, acc_);
  args_.centred_factor = centred_factor_.get();
  args_.offset = offset_.get();
}

void NormBackward::add_up() {
  const ReductionPlan plan(layout_);
  const auto reduce_rows = kernels_.reduce_rows[static_cast<int>(source_)];
  const auto reduce_planes = kernels_.reduce_planes[static_cast<int>(source_)];
  const Partials partials = run_reduction(
      layout_, plan, 4,
      [&](int64_t begin, int64_t end, double* g, double* gx, double* scratch) {
        reduce_rows(layout_, args_, begin, end, g, gx, scratch);
      },
      [&](const PlaneRange& range, double* g, double* gx) {
        reduce_planes(layout_, args_, range, g, gx);
      });
  for (int64_t p = 0; p < plan.num_partials(); ++p) {
    for (int64_t c = 0; c < layout_.channels; ++c) {
      sum_g_[c] += partials.first[p * layout_.channels + c];
      sum_gx_[c] += partials.second[p * layout_.channels + c];
    }
  }
}

void NormBackward::apply(int64_t begin, int64_t end, void* grad_x, void* grad_residual) const {
  BackwardArgs args = args_;
  args.grad_x = grad_x;
  args.grad_residual = grad_residual;
  kernels_.backward[static_cast<int>(source_)](layout_, args, begin, end);
}

Channels NormBackward::grad_gate() const {
  Channels grad(gate_.size());
  for (size_t c = 0; c < grad.size(); ++c)
    grad[c] = weight_[c] * (affine_.rstd[c] * sum_gx_[c]) + bias_[c] * sum_g_[c];
  return grad;
}

Channels NormBackward::grad_weight() const {
  Channels grad(gate_.size());
  for (size_t c = 0; c < grad.size(); ++c) grad[c] = gate_[c] * (affine_.rstd[c] * sum_gx_[c]);
  return grad;
}

Channels NormBackward::grad_bias() const {
  Channels grad(gate_.size());
  for (size_t c = 0; c < grad.size(); ++c) grad[c] = gate_[c] * sum_g_[c];
  return grad;
}

}  // namespace pfs::cpu
