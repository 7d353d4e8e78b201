// winograd_conv and bn_gate_act in one operator: the statistics are made of the convolution's output
// while it is in the cache, and the gradient of that output exists in the cache alone, block by block,
// where the convolution's own gradient reads it.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "../pfs_ops.h"
#include "bn_gate_act_parts.h"
#include "isa.h"
#include "kept_memory.h"
#include "winograd_pass.h"

namespace pfs {
namespace {

using cpu::Layout;
using cpu::Lines;
using cpu::NormBackward;
using cpu::RowBlocks;
using cpu::WinogradPass;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Adds up the lines of u that a block has written.
class StatisticsWorker {
 public:
  StatisticsWorker(const WinogradPass& pass, const RowBlocks& blocks, const Layout& layout,
                   const cpu::DtypeKernels& kernels, cpu::Partials& partials)
      : pass_(pass), blocks_(blocks), layout_(layout), kernels_(kernels), partials_(partials),
        scratch_(6 * layout.unit) {}

  static constexpr bool kMakesInput = false;
  const void* input(int64_t) const { return pass_.x; }
  void done(int64_t block) {
    const Lines lines = blocks_.written(block);
    const int64_t line = pass_.shape.out_width * layout_.channels;
    kernels_.stats_rows(layout_, pass_.y, lines.first * line, lines.last * line,
                        partials_.first.data() + block * layout_.channels,
                        partials_.second.data() + block * layout_.channels, scratch_.get());
  }

 private:
  const WinogradPass& pass_;
  const RowBlocks& blocks_;
  const Layout& layout_;
  const cpu::DtypeKernels& kernels_;
  cpu::Partials& partials_;
  cpu::Scratch scratch_;
};

// Convolves, and returns the moments of the output.
cpu::Moments convolve(const WinogradPass& pass, const Layout& layout,
                      const cpu::DtypeKernels& kernels) {
  if (cpu::is_empty(pass)) {
    const cpu::Channels zeros(layout.channels, 0.0);
    return {zeros, zeros};
  }
  if (!cpu::runs_by_tiles(pass)) {
    cpu::run_winograd(pass);
    return cpu::batch_moments(kernels, layout, pass.y);
  }
  const RowBlocks blocks(pass);
  const size_t values = blocks.count() * layout.channels;
  cpu::Partials partials{std::vector<double>(values), std::vector<double>(values)};
  cpu::run_by_rows(pass, blocks, [&] {
    return StatisticsWorker(pass, blocks, layout, kernels, partials);
  });
  std::vector<int64_t> counts;
  for (int64_t block = 0; block < blocks.count(); ++block) {
    const Lines lines = blocks.written(block);
    counts.push_back((lines.last - lines.first) * pass.shape.out_width);
  }
  return cpu::merge_moments(partials, counts, layout.channels);
}

// Makes the gradient of u for the lines that a block reads.
class GradientWorker {
 public:
  GradientWorker(const NormBackward& norm, const WinogradPass& pass, const RowBlocks& blocks,
                 void* grad_residual)
      : norm_(norm), blocks_(blocks), line_(pass.shape.width * pass.shape.in_channels),
        itemsize_(pass.kernels.itemsize), grad_residual_(grad_residual) {
    int64_t most = 0;
    for (int64_t block = 0; block < blocks.count(); ++block) {
      const Lines lines = made(block);
      most = std::max(most, lines.last - lines.first);
    }
    memory_ = cpu::allocate(static_cast<size_t>(most * line_ * itemsize_));
  }

  static constexpr bool kMakesInput = true;
  const void* input(int64_t block) {
    const Lines all = made(block), own = blocks_.own(block);
    // Where line 0 would be, were it there.
    const auto address = reinterpret_cast<uintptr_t>(memory_.get()) -
                         static_cast<uintptr_t>(all.first * line_ * itemsize_);
    auto* grad_u = reinterpret_cast<void*>(address);
    if (grad_residual_ == nullptr) {
      make(all, grad_u, nullptr);
    } else {
      make({all.first, own.first}, grad_u, nullptr);
      make(own, grad_u, grad_residual_);
      make({own.last, all.last}, grad_u, nullptr);
    }
    return grad_u;
  }
  void done(int64_t) const {}

 private:
  Lines made(int64_t block) const {
    const Lines read = blocks_.read(block), own = blocks_.own(block);
    return {std::min(read.first, own.first), std::max(read.last, own.last)};
  }
  void make(const Lines& lines, void* grad_u, void* grad_residual) const {
    if (lines.first < lines.last) {
      norm_.apply(lines.first * line_, lines.last * line_, grad_u, grad_residual);
    }
  }

  const NormBackward& norm_;
  const RowBlocks& blocks_;
  const int64_t line_, itemsize_;
  void* grad_residual_;
  c10::DataPtr memory_;
};

}  // namespace

ConvBnGateActOutputs conv_bn_gate_act_cpu(
    const at::Tensor& x_in, const at::Tensor& conv_weight, const OptionalTensor& conv_bias,
    const OptionalTensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef padding, int64_t tile, double eps,
    std::string_view act) {
  constexpr const char* op = "conv_bn_gate_act";
  checks::check_winograd_input(op, x_in, conv_weight, conv_bias, padding);
  const at::ScalarType type = x_in.scalar_type();
  const cpu::WinogradKernels& winograd = cpu::winograd_kernels(op, tile, type);
  const at::Tensor x = x_in.contiguous(kLast), dense_weight = conv_weight.contiguous(kLast);
  at::Tensor dense_bias;
  if (checks::is_present(conv_bias)) dense_bias = conv_bias->to(at::kFloat).contiguous();
  const cpu::WinogradShape shape =
      cpu::winograd_shape(winograd, x.size(0), x.size(1), x.size(2), x.size(3),
                          conv_weight.size(0), padding[0], padding[1], /*reversed=*/false);
  const at::Tensor u = cpu::empty(
      {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, type, kLast);
  checks::check_bn_gate_act(u, gate, weight, bias, residual, std::nullopt, std::nullopt,
                            /*training=*/true, eps, act, op);
  const cpu::DtypeKernels& kernels = cpu::norm_kernels(type);
  const WinogradPass pass{winograd,
                          shape,
                          data_of(x),
                          data_of(dense_weight),
                          static_cast<const float*>(data_of(dense_bias)),
                          u.mutable_data_ptr()};
  const cpu::Moments moments = convolve(pass, cpu::make_rows_layout(u, kernels.tile), kernels);
  const at::TensorOptions acc = u.options().dtype(checks::acc_type(u));
  const at::Tensor mean = cpu::write_channels(moments.mean, acc);
  const at::Tensor var = cpu::write_channels(moments.var, acc);
  auto [y, mean_used, var_used, aux] =
      bn_gate_act_cpu(u, gate, weight, bias, residual, mean, var, /*training=*/false, eps, act);
  return {y, u, mean, var, aux};
}

BnGateActGrads conv_bn_gate_act_backward_cpu(
    const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& mean, const at::Tensor& var,
    const at::Tensor& conv_weight, const OptionalTensor& gate, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& aux, at::IntArrayRef padding, int64_t tile,
    double eps, std::string_view act_name, bool has_residual, std::array<bool, 5> output_mask,
    const OptionalTensor& grad_branch) {
  constexpr const char* op = "_conv_bn_gate_act_backward";
  checks::check_winograd_gradient(op, grad_y, conv_weight, padding);
  checks::check_conv_bn_output(op, u);
  const Act act = checks::check_bn_gate_act_backward(grad_y, u, mean, var, gate, weight, bias, aux,
                                                     act_name, has_residual, op);
  const at::ScalarType type = u.scalar_type();
  const cpu::WinogradKernels& winograd = cpu::winograd_kernels(op, tile, type);
  const auto [wants_x, wants_gate, wants_weight, wants_bias, wants_residual] = output_mask;
  const bool sums = wants_x || wants_gate || wants_weight || wants_bias;
  const AuxKind kept = aux_kind(act, has_residual);
  const at::Tensor dense_grad = grad_y.contiguous(kLast);
  const NormBackward norm(dense_grad, u, mean, var, gate, weight, bias,
                          kept == AuxKind::kPreAct ? aux.contiguous(kLast) : aux, act,
                          has_residual, /*training=*/true, eps, sums, /*by_rows=*/true);

  at::Tensor grad_x = at::empty({0}, u.options()), grad_residual = at::empty({0}, u.options());
  // A mask can be applied twice: a copy of the gradient may become that of residual, before blocks
  // read it at their edges.
  const bool in_place = wants_residual && kept != AuxKind::kPreAct &&
                        dense_grad.const_data_ptr() != grad_y.const_data_ptr();
  if (wants_residual)
    grad_residual = in_place ? dense_grad : cpu::empty(u.sizes(), type, kLast);
  void* to_residual = wants_residual ? grad_residual.mutable_data_ptr() : nullptr;
  const auto all_at_once = [&](void* grad_u) {
    if (u.numel() == 0) return;
    cpu::for_each_chunk_backwards(norm.layout(), [&](int64_t begin, int64_t end) {
      norm.apply(begin, end, grad_u, to_residual);
    });
  };
  if (in_place) {
    all_at_once(nullptr);
    to_residual = nullptr;
  }
  if (wants_x) {
    const at::Tensor dense_weight = conv_weight.contiguous(kLast);
    const cpu::WinogradShape shape = cpu::winograd_shape(
        winograd, u.size(0), u.size(1), u.size(2), u.size(3), conv_weight.size(1), 2 - padding[0],
        2 - padding[1], /*reversed=*/true);
    grad_x = cpu::empty({shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                        type, kLast);
    at::Tensor branch;
    if (checks::is_present(grad_branch)) {
      checks::check_grad_branch(op, *grad_branch, grad_x, grad_y);
      branch = grad_branch->contiguous(kLast);
    }
    WinogradPass pass{winograd, shape,   nullptr, data_of(dense_weight),
                      nullptr,  grad_x.mutable_data_ptr(), data_of(branch)};
    if (cpu::is_empty(pass)) {
      all_at_once(nullptr);
    } else if (cpu::runs_by_tiles(pass) && u.numel() > 0) {
      const RowBlocks blocks(pass);
      cpu::run_by_rows(pass, blocks,
                       [&] { return GradientWorker(norm, pass, blocks, to_residual); });
    } else {
      const at::Tensor grad_u = cpu::empty(u.sizes(), type, kLast);
      all_at_once(grad_u.mutable_data_ptr());
      pass.x = data_of(grad_u);
      cpu::run_winograd(pass);
    }
  } else if (wants_residual && !in_place) {
    all_at_once(nullptr);
  }
  const at::TensorOptions acc = u.options().dtype(checks::acc_type(u));
  const auto wanted = [&](bool wants, const cpu::Channels& values) {
    return wants ? cpu::write_channels(values, acc) : at::empty({0}, acc);
  };
  return {grad_x, wanted(wants_gate, norm.grad_gate()), wanted(wants_weight, norm.grad_weight()),
          wanted(wants_bias, norm.grad_bias()), grad_residual};
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("conv_bn_gate_act", &pfs::conv_bn_gate_act_cpu);
  m.impl("_conv_bn_gate_act_backward", &pfs::conv_bn_gate_act_backward_cpu);
}
