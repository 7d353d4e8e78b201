// bn_gate_act on the CPU: checks, allocation, threads. The arithmetic is in
// bn_gate_act_kernel_impl.h.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../checks.h"
#include "../pfs_ops.h"
#include "bn_gate_act_plan.h"
#include "isa.h"
#include "kept_memory.h"

namespace pfs {

const char* cpu_isa() { return cpu::chosen_isa().name; }

namespace {

using cpu::BackwardArgs;
using cpu::DtypeKernels;
using cpu::ForwardArgs;
using cpu::Layout;
using cpu::ReductionPlan;
using cpu::SlopeSource;
using Channels = std::vector<double>;  // [C]

const DtypeKernels& kernels_for(at::ScalarType type) {
  const cpu::Dtype dtype = type == at::kDouble  ? cpu::Dtype::kDouble
                           : type == at::kFloat ? cpu::Dtype::kFloat
                                                : cpu::Dtype::kBFloat16;
  return cpu::chosen_isa().kernels->of[static_cast<int>(dtype)];
}

Channels read_channels(const OptionalTensor& values, int64_t num_channels, double absent) {
  Channels out(num_channels, absent);
  if (!values.has_value() || !values->defined()) return out;
  const at::Tensor dense = values->contiguous();
  for (int64_t c = 0; c < num_channels; ++c) {
    out[c] = dense.scalar_type() == at::kDouble ? dense.const_data_ptr<double>()[c]
                                                : dense.const_data_ptr<float>()[c];
  }
  return out;
}

// Rounds to the dtype of the accumulators.
at::Tensor write_channels(const Channels& values, const at::TensorOptions& acc) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, acc);
  for (size_t c = 0; c < values.size(); ++c) {
    if (out.scalar_type() == at::kDouble) {
      out.mutable_data_ptr<double>()[c] = values[c];
    } else {
      out.mutable_data_ptr<float>()[c] = static_cast<float>(values[c]);
    }
  }
  return out;
}

// What the kernels read per channel, in the form they want.
class Expanded {
 public:
  Expanded(const DtypeKernels& kernels, const Layout& layout, const Channels& values,
           const at::TensorOptions& acc)
      : data_(at::empty({layout.period > 0 ? layout.period : layout.channels}, acc)) {
    kernels.expand(layout, values.data(), data_.mutable_data_ptr());
  }
  const void* get() const { return data_.const_data_ptr(); }

 private:
  at::Tensor data_;
};

struct Affine {
  Channels rstd, scale, shift;
};

// z = (x - mean) * scale + shift. Forward and backward both start from the rounded mean and var,
// and so agree on z to the bit.
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

struct Partials {
  std::vector<double> first, second;  // [num_partials, C]
};

template <class Rows, class Planes>
Partials run_reduction(const Layout& layout, const ReductionPlan& plan, int64_t scratch_units,
                       const Rows& rows, const Planes& planes) {
  Partials partials{std::vector<double>(plan.num_partials() * layout.channels),
                    std::vector<double>(plan.num_partials() * layout.channels)};
  at::parallel_for(0, plan.num_chunks(), 1, [&](int64_t first, int64_t last) {
    cpu::Scratch scratch(scratch_units * layout.unit);
    for (int64_t chunk = first; chunk < last; ++chunk) {
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

// Merges means and squared deviations around the mean of the first partial result (Chan et al.
// 1979, without its divisions).
void merge_stats(const Layout& layout, const ReductionPlan& plan, const Partials& partials,
                 Channels& mean, Channels& var) {
  const int64_t num_channels = layout.channels;
  const double total = static_cast<double>(layout.numel / num_channels);
  Channels shift(num_channels, 0.0);
  for (int64_t p = 0; p < plan.num_partials(); ++p) {
    const double n = static_cast<double>(plan.count(p));
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
}

void batch_stats(const DtypeKernels& kernels, const Layout& layout, const void* x, Channels& mean,
                 Channels& var) {
  const ReductionPlan plan(layout);
  const Partials partials = run_reduction(
      layout, plan, 6,
      [&](int64_t begin, int64_t end, double* m, double* m2, double* scratch) {
        kernels.stats_rows(layout, x, begin, end, m, m2, scratch);
      },
      [&](const cpu::PlaneRange& range, double* m, double* m2) {
        kernels.stats_planes(layout, x, range, m, m2);
      });
  merge_stats(layout, plan, partials, mean, var);
}

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

// x: contiguous in the layout that it suggests.
at::Tensor empty_like(const at::Tensor& x) {
  return cpu::empty(x.sizes(), x.scalar_type(), x.suggest_memory_format());
}

at::Tensor make_aux(const at::Tensor& x, AuxKind kind) {
  if (kind == AuxKind::kPreAct) return empty_like(x);
  return cpu::empty({kind == AuxKind::kBitmask ? (x.numel() + 7) / 8 : 0}, at::kByte,
                    at::MemoryFormat::Contiguous);
}

}  // namespace

BnGateActOutputs bn_gate_act_cpu(const at::Tensor& x_in, const OptionalTensor& gate,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, bool training, double eps,
                                 std::string_view act_name) {
  const Act act = checks::check_bn_gate_act(x_in, gate, weight, bias, residual, running_mean,
                                            running_var, training, eps, act_name);
  const bool has_residual = checks::is_present(residual);
  const auto format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const at::TensorOptions acc = x.options().dtype(checks::acc_type(x));
  const int64_t num_channels = x.size(1);
  const DtypeKernels& kernels = kernels_for(x.scalar_type());
  const Layout layout = cpu::make_layout(x, kernels.tile);

  at::Tensor y = empty_like(x);
  at::Tensor aux = make_aux(x, aux_kind(act, has_residual));
  Channels mean(num_channels, 0.0), var(num_channels, 0.0);
  if (!training) {
    mean = read_channels(running_mean, num_channels, 0);
    var = read_channels(running_var, num_channels, 0);
  } else if (layout.numel > 0) {
    batch_stats(kernels, layout, x.const_data_ptr(), mean, var);
  }
  const at::Tensor mean_out = write_channels(mean, acc);
  const at::Tensor var_out = write_channels(var, acc);
  if (layout.numel == 0) return {y, mean_out, var_out, aux};

  const at::Tensor added = has_residual ? residual->contiguous(format) : at::Tensor();
  const Affine affine = make_affine(
      read_channels(var_out, num_channels, 0), read_channels(gate, num_channels, 1),
      read_channels(weight, num_channels, 1), read_channels(bias, num_channels, 0), eps);
  const Expanded means(kernels, layout, mean, acc);
  const Expanded scale(kernels, layout, affine.scale, acc);
  const Expanded shift(kernels, layout, affine.shift, acc);
  const ForwardArgs args{x.const_data_ptr(),    has_residual ? added.const_data_ptr() : nullptr,
                         means.get(),           scale.get(),
                         shift.get(),           y.mutable_data_ptr(),
                         aux.mutable_data_ptr()};
  const auto kernel = kernels.forward[static_cast<int>(act)][has_residual ? 1 : 0];
  cpu::for_each_chunk_backwards(
      layout, [&](int64_t begin, int64_t end) { kernel(layout, args, begin, end); });
  return {y, mean_out, var_out, aux};
}

BnGateActGrads bn_gate_act_backward_cpu(const at::Tensor& grad_y_in, const at::Tensor& x_in,
                                        const at::Tensor& mean_in, const at::Tensor& var_in,
                                        const OptionalTensor& gate_in,
                                        const OptionalTensor& weight_in,
                                        const OptionalTensor& bias_in, const at::Tensor& aux_in,
                                        bool training, double eps, std::string_view act_name,
                                        bool has_residual, std::array<bool, 5> output_mask) {
  const Act act =
      checks::check_bn_gate_act_backward(grad_y_in, x_in, mean_in, var_in, gate_in, weight_in,
                                         bias_in, aux_in, act_name, has_residual);
  const auto format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const at::Tensor grad_y = grad_y_in.contiguous(format);
  const at::Tensor aux =
      aux_kind(act, has_residual) == AuxKind::kPreAct ? aux_in.contiguous(format) : aux_in;
  const at::TensorOptions acc = x.options().dtype(checks::acc_type(x));
  const int64_t num_channels = x.size(1);
  const DtypeKernels& kernels = kernels_for(x.scalar_type());
  const Layout layout = cpu::make_layout(x, kernels.tile);
  const auto [wants_x, wants_gate, wants_weight, wants_bias, wants_residual] = output_mask;

  at::Tensor grad_x = wants_x ? empty_like(x) : at::empty({0}, x.options());
  at::Tensor grad_residual = wants_residual ? empty_like(x) : at::empty({0}, x.options());
  const Channels mean = read_channels(mean_in, num_channels, 0);
  const Channels gate = read_channels(gate_in, num_channels, 1);
  const Channels weight = read_channels(weight_in, num_channels, 1);
  const Channels bias = read_channels(bias_in, num_channels, 0);
  const Affine affine =
      make_affine(read_channels(var_in, num_channels, 0), gate, weight, bias, eps);

  Channels sum_g(num_channels, 0.0), sum_gx(num_channels, 0.0);
  if (layout.numel > 0) {
    const SlopeSource source = slope_source(act, has_residual);
    const Expanded means(kernels, layout, mean, acc);
    const Expanded scale(kernels, layout, affine.scale, acc);
    const Expanded shift(kernels, layout, affine.shift, acc);
    BackwardArgs args{grad_y.const_data_ptr(),
                      x.const_data_ptr(),
                      aux.const_data_ptr(),
                      means.get(),
                      scale.get(),
                      shift.get(),
                      nullptr,
                      nullptr,
                      wants_x ? grad_x.mutable_data_ptr() : nullptr,
                      wants_residual ? grad_residual.mutable_data_ptr() : nullptr,
                      training};

    if (wants_gate || wants_weight || wants_bias || (wants_x && training)) {
      const ReductionPlan plan(layout);
      const auto reduce_rows = kernels.reduce_rows[static_cast<int>(source)];
      const auto reduce_planes = kernels.reduce_planes[static_cast<int>(source)];
      const Partials partials = run_reduction(
          layout, plan, 4,
          [&](int64_t begin, int64_t end, double* g, double* gx, double* scratch) {
            reduce_rows(layout, args, begin, end, g, gx, scratch);
          },
          [&](const cpu::PlaneRange& range, double* g, double* gx) {
            reduce_planes(layout, args, range, g, gx);
          });
      for (int64_t p = 0; p < plan.num_partials(); ++p) {
        for (int64_t c = 0; c < num_channels; ++c) {
          sum_g[c] += partials.first[p * num_channels + c];
          sum_gx[c] += partials.second[p * num_channels + c];
        }
      }
    }
    if (wants_x || wants_residual) {
      const double count = static_cast<double>(layout.numel / num_channels);
      Channels centred_factor(num_channels), offset(num_channels);
      for (int64_t c = 0; c < num_channels; ++c) {
        centred_factor[c] =
            -affine.scale[c] * affine.rstd[c] * affine.rstd[c] * (sum_gx[c] / count);
        offset[c] = -affine.scale[c] * (sum_g[c] / count);
      }
      const Expanded centred_factors(kernels, layout, centred_factor, acc);
      const Expanded offsets(kernels, layout, offset, acc);
      args.centred_factor = centred_factors.get();
      args.offset = offsets.get();
      const auto kernel = kernels.backward[static_cast<int>(source)];
      cpu::for_each_chunk_backwards(
          layout, [&](int64_t begin, int64_t end) { kernel(layout, args, begin, end); });
    }
  }

  Channels grad_gate(num_channels), grad_weight(num_channels), grad_bias(num_channels);
  for (int64_t c = 0; c < num_channels; ++c) {
    const double sum_g_xhat = affine.rstd[c] * sum_gx[c];
    grad_gate[c] = weight[c] * sum_g_xhat + bias[c] * sum_g[c];
    grad_weight[c] = gate[c] * sum_g_xhat;
    grad_bias[c] = gate[c] * sum_g[c];
  }
  const auto wanted = [&](bool wants, const Channels& values) {
    return wants ? write_channels(values, acc) : at::empty({0}, acc);
  };
  return {grad_x, wanted(wants_gate, grad_gate), wanted(wants_weight, grad_weight),
          wanted(wants_bias, grad_bias), grad_residual};
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("bn_gate_act", &pfs::bn_gate_act_cpu);
  m.impl("_bn_gate_act_backward", &pfs::bn_gate_act_backward_cpu);
}
