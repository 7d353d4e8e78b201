// The gradients of the operators: what each keeps of its forward pass, and which operator takes the
// gradient. A second derivative is refused by name.
//
// In C++, since a step of a small network calls some seventy of these: registered in Python, each
// takes a quarter of a millisecond of the host's time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "pfs_ops.h"

namespace pfs {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

bool needs_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
bool needs_grad(const OptionalTensor& t) { return t.has_value() && needs_grad(*t); }
template <class T>
bool needs_grad(const T&) {
  return false;
}
// Whether the graph wants a node for a call.
template <class... Args>
bool recorded(const Args&... args) {
  return at::GradMode::is_enabled() && (needs_grad(args) || ...);
}

Tensor tensor_of(const OptionalTensor& t) { return t.value_or(Tensor()); }
OptionalTensor optional_of(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Whether inputs want a gradient, one after another: those that are absent have no edge.
class Edges {
 public:
  explicit Edges(AutogradContext* ctx) : ctx_(ctx) {}
  bool wants(bool present = true) { return present && ctx_->needs_input_grad(next_++); }

 private:
  AutogradContext* ctx_;
  size_t next_ = 0;
};

Tensor where(bool wanted, const Tensor& grad) { return wanted ? grad : Tensor(); }

// What has no tensor in it is kept by name.
template <class T>
void keep(AutogradContext* ctx, const char* name, T value) {
  ctx->saved_data[name] = std::move(value);
}
void keep_layout(AutogradContext* ctx, const Tensor& x) {
  keep(ctx, "layout", static_cast<int64_t>(x.suggest_memory_format()));
}
Tensor in_kept_layout(AutogradContext* ctx, const Tensor& grad) {
  return grad.contiguous(static_cast<at::MemoryFormat>(ctx->saved_data["layout"].toInt()));
}
std::vector<SymInt> kept_list(AutogradContext* ctx, const char* name) {
  return ctx->saved_data[name].toSymIntVector();
}
std::vector<int64_t> kept_ints(AutogradContext* ctx, const char* name) {
  return ctx->saved_data[name].toIntVector();
}
int64_t kept_int(AutogradContext* ctx, const char* name) { return ctx->saved_data[name].toInt(); }
double kept_double(AutogradContext* ctx, const char* name) {
  return ctx->saved_data[name].toDouble();
}
bool kept_bool(AutogradContext* ctx, const char* name) { return ctx->saved_data[name].toBool(); }
std::string kept_text(AutogradContext* ctx, const char* name) {
  return ctx->saved_data[name].toStringRef();
}

// ---- the operators, as the dispatcher knows them ----

using Act = std::string_view;
using Mask = std::array<bool, 5>;

struct BnGateActOp {
  static constexpr const char* kName = "pfs_fast::bn_gate_act";
  using Signature = BnGateActOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&, bool, double,
                                     Act);
};
struct BnGateActGradOp {
  static constexpr const char* kName = "pfs_fast::_bn_gate_act_backward";
  static constexpr const char* kOf = "bn_gate_act";
  using Signature = BnGateActGrads(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, bool, double, Act, bool,
                                   Mask);
};
struct FrozenConvOp {
  static constexpr const char* kName = "pfs_fast::frozen_conv";
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef,
                           SymIntArrayRef, SymIntArrayRef, SymInt);
};
struct FrozenConvGradOp {
  static constexpr const char* kName = "pfs_fast::_frozen_conv_backward";
  static constexpr const char* kOf = "frozen_conv";
  using Signature = Tensor(const Tensor&, const Tensor&, SymIntArrayRef, SymIntArrayRef,
                           SymIntArrayRef, SymIntArrayRef, SymInt);
};
struct WinogradConvOp {
  static constexpr const char* kName = "pfs_fast::winograd_conv";
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef,
                           int64_t);
};
struct WinogradConvGradOp {
  static constexpr const char* kName = "pfs_fast::_winograd_conv_backward";
  static constexpr const char* kOf = "winograd_conv";
  using Signature = Tensor(const Tensor&, const Tensor&, SymIntArrayRef, int64_t);
};
struct MaxPoolOp {
  static constexpr const char* kName = "pfs_fast::max_pool";
  using Signature = MaxPoolOutputs(const Tensor&, at::IntArrayRef, at::IntArrayRef,
                                   at::IntArrayRef);
};
struct MaxPoolGradOp {
  static constexpr const char* kName = "pfs_fast::_max_pool_backward";
  static constexpr const char* kOf = "max_pool";
  using Signature = Tensor(const Tensor&, const Tensor&, SymIntArrayRef, at::IntArrayRef,
                           at::IntArrayRef, at::IntArrayRef);
};
struct ConvBnGateActOp {
  static constexpr const char* kName = "pfs_fast::conv_bn_gate_act";
  using Signature = ConvBnGateActOutputs(const Tensor&, const Tensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         SymIntArrayRef, int64_t, double, Act);
};
struct ConvBnGateActGradOp {
  static constexpr const char* kName = "pfs_fast::_conv_bn_gate_act_backward";
  static constexpr const char* kOf = "conv_bn_gate_act";
  using Signature = BnGateActGrads(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, SymIntArrayRef, int64_t,
                                   double, Act, bool, Mask, const OptionalTensor&);
};

template <class Op>
const auto& handle() {
  static const auto found = c10::Dispatcher::singleton()
                                .findSchemaOrThrow(Op::kName, "")
                                .template typed<typename Op::Signature>();
  return found;
}

// The operator itself, past autograd.
template <class Op, class... Args>
auto below(const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return handle<Op>().call(args...);
}

// ---- forward and backward ----

struct BnGateAct : torch::autograd::Function<BnGateAct> {
  static Tensors forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& gate,
                         const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, bool training, double eps, Act act) {
    auto [y, mean, var, aux] = below<BnGateActOp>(x, gate, weight, bias, residual, running_mean,
                                                     running_var, training, eps, act);
    ctx->mark_non_differentiable({mean, var, aux});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {x, mean, var, tensor_of(gate), tensor_of(weight), tensor_of(bias), aux});
    keep(ctx, "training", training);
    keep(ctx, "eps", eps);
    keep(ctx, "act", std::string(act));
    keep(ctx, "residual", checks::is_present(residual));
    return {y, mean, var, aux};
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors found(10);
    if (!grads[0].defined()) return found;
    const Tensors saved = ctx->get_saved_variables();
    const bool has_residual = kept_bool(ctx, "residual");
    Edges edges(ctx);
    Mask mask{};
    mask[0] = edges.wants();
    for (int i = 1; i < 4; ++i) mask[i] = edges.wants(saved[2 + i].defined());
    mask[4] = edges.wants(has_residual);
    const auto [x, gate, weight, bias, residual] = handle<BnGateActGradOp>().call(
        grads[0], saved[0], saved[1], saved[2], optional_of(saved[3]), optional_of(saved[4]),
        optional_of(saved[5]), saved[6], kept_bool(ctx, "training"), kept_double(ctx, "eps"),
        kept_text(ctx, "act"), has_residual, mask);
    found[0] = where(mask[0], x);
    found[1] = where(mask[1], gate);
    found[2] = where(mask[2], weight);
    found[3] = where(mask[3], bias);
    found[4] = where(mask[4], residual);
    return found;
  }
};

struct FrozenConv : torch::autograd::Function<FrozenConv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                        SymIntArrayRef dilation, SymInt groups) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight});
    keep(ctx, "input_size", x.sym_sizes().vec());
    keep_layout(ctx, x);
    keep(ctx, "stride", stride.vec());
    keep(ctx, "padding", padding.vec());
    keep(ctx, "dilation", dilation.vec());
    keep(ctx, "groups", groups);
    return below<FrozenConvOp>(x, weight, bias, stride, padding, dilation, groups);
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors found(7);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return found;
    found[0] = in_kept_layout(
        ctx, handle<FrozenConvGradOp>().call(
                 grads[0], ctx->get_saved_variables()[0], kept_list(ctx, "input_size"),
                 kept_list(ctx, "stride"), kept_list(ctx, "padding"), kept_list(ctx, "dilation"),
                 ctx->saved_data["groups"].toSymInt()));
    return found;
  }
};

struct WinogradConv : torch::autograd::Function<WinogradConv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, SymIntArrayRef padding, int64_t tile) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight});
    keep_layout(ctx, x);
    keep(ctx, "padding", padding.vec());
    keep(ctx, "tile", tile);
    return below<WinogradConvOp>(x, weight, bias, padding, tile);
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors found(5);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return found;
    found[0] = in_kept_layout(ctx, handle<WinogradConvGradOp>().call(
                                       grads[0], ctx->get_saved_variables()[0],
                                       kept_list(ctx, "padding"), kept_int(ctx, "tile")));
    return found;
  }
};

struct MaxPool : torch::autograd::Function<MaxPool> {
  static Tensors forward(AutogradContext* ctx, const Tensor& x, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding) {
    auto [y, offsets] = below<MaxPoolOp>(x, kernel, stride, padding);
    ctx->mark_non_differentiable({offsets});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({offsets});
    keep(ctx, "input_size", x.sym_sizes().vec());
    keep_layout(ctx, x);
    keep(ctx, "kernel", kernel.vec());
    keep(ctx, "stride", stride.vec());
    keep(ctx, "padding", padding.vec());
    return {y, offsets};
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors found(4);
    if (!grads[0].defined()) return found;
    found[0] = in_kept_layout(
        ctx, handle<MaxPoolGradOp>().call(grads[0], ctx->get_saved_variables()[0],
                                         kept_list(ctx, "input_size"), kept_ints(ctx, "kernel"),
                                         kept_ints(ctx, "stride"), kept_ints(ctx, "padding")));
    return found;
  }
};

// kBranch: x is a result, too, so that its gradient has come when that of y is taken.
template <bool kBranch>
struct ConvBnGateAct : torch::autograd::Function<ConvBnGateAct<kBranch>> {
  static Tensors forward(AutogradContext* ctx, const Tensor& x, const Tensor& conv_weight,
                         const OptionalTensor& conv_bias, const OptionalTensor& gate,
                         const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, SymIntArrayRef padding, int64_t tile,
                         double eps, Act act) {
    auto [y, u, mean, var, aux] = below<ConvBnGateActOp>(
        x, conv_weight, conv_bias, gate, weight, bias, residual, padding, tile, eps, act);
    ctx->mark_non_differentiable({u, mean, var, aux});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {u, mean, var, conv_weight, tensor_of(gate), tensor_of(weight), tensor_of(bias), aux});
    keep_layout(ctx, x);
    keep(ctx, "padding", padding.vec());
    keep(ctx, "tile", tile);
    keep(ctx, "eps", eps);
    keep(ctx, "act", std::string(act));
    keep(ctx, "conv_bias", checks::is_present(conv_bias));
    keep(ctx, "residual", checks::is_present(residual));
    if constexpr (kBranch) return {y, u, mean, var, aux, x};
    return {y, u, mean, var, aux};
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    Tensors found(11);
    const Tensor branch = kBranch ? grads[5] : Tensor();
    if (!grads[0].defined()) {
      found[0] = branch;
      return found;
    }
    const Tensors saved = ctx->get_saved_variables();
    const bool has_residual = kept_bool(ctx, "residual");
    Edges edges(ctx);
    Mask mask{};
    mask[0] = edges.wants();
    edges.wants();  // conv_weight
    edges.wants(kept_bool(ctx, "conv_bias"));
    for (int i = 1; i < 4; ++i) mask[i] = edges.wants(saved[3 + i].defined());
    mask[4] = edges.wants(has_residual);
    const auto [x, gate, weight, bias, residual] = handle<ConvBnGateActGradOp>().call(
        grads[0], saved[0], saved[1], saved[2], saved[3], optional_of(saved[4]),
        optional_of(saved[5]), optional_of(saved[6]), saved[7], kept_list(ctx, "padding"),
        kept_int(ctx, "tile"), kept_double(ctx, "eps"), kept_text(ctx, "act"), has_residual, mask,
        optional_of(branch));
    if (mask[0]) found[0] = in_kept_layout(ctx, x);
    found[3] = where(mask[1], gate);
    found[4] = where(mask[2], weight);
    found[5] = where(mask[3], bias);
    found[6] = where(mask[4], residual);
    return found;
  }
};

// What an operator that takes a gradient has found; the gradient of that is refused.
struct Once : torch::autograd::Function<Once> {
  static Tensors forward(AutogradContext* ctx, const at::TensorList&, const Tensors* results,
                         const char* op) {
    keep(ctx, "op", std::string(op));
    return *results;
  }
  static Tensors backward(AutogradContext* ctx, const Tensors&) {
    const std::string op = kept_text(ctx, "op");
    TORCH_CHECK(false, op, ": the gradient must be taken once, got a second derivative; ",
                "use pfs_fast.ops.reference.", op, " for it");
  }
};

// ---- kernels ----

void collect(Tensors& all, const Tensor& t) {
  if (t.defined()) all.push_back(t);
}
void collect(Tensors& all, const OptionalTensor& t) {
  if (t.has_value()) collect(all, *t);
}
template <class T>
void collect(Tensors&, const T&) {}

template <class Result>
struct Results;
template <>
struct Results<Tensor> {
  static Tensors list(const Tensor& result) { return {result}; }
  static Tensor from(const Tensors& list) { return list[0]; }
  static Tensor from(const Tensor& result) { return result; }
};
template <class... T>
struct Results<std::tuple<T...>> {
  static Tensors list(const std::tuple<T...>& results) {
    return std::apply([](const auto&... result) { return Tensors{result...}; }, results);
  }
  static std::tuple<T...> from(const Tensors& list) {
    return from(list, std::index_sequence_for<T...>{});
  }
  template <size_t... i>
  static std::tuple<T...> from(const Tensors& list, std::index_sequence<i...>) {
    return {list[i]...};
  }
};

template <class Op, class Function, class Signature = typename Op::Signature>
struct Differentiable;
template <class Op, class Function, class Result, class... Args>
struct Differentiable<Op, Function, Result(Args...)> {
  static Result run(Args... args) {
    if (!recorded(args...)) return below<Op>(args...);
    return Results<Result>::from(Function::apply(args...));
  }
};

template <class Op, class Signature = typename Op::Signature>
struct DifferentiableNoMore;
template <class Op, class Result, class... Args>
struct DifferentiableNoMore<Op, Result(Args...)> {
  static Result run(Args... args) {
    const Result found = below<Op>(args...);
    if (!recorded(args...)) return found;
    Tensors inputs;
    (collect(inputs, args), ...);
    const Tensors results = Results<Result>::list(found);
    return Results<Result>::from(Once::apply(at::TensorList(inputs), &results, Op::kOf));
  }
};

using BranchOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BranchOutputs conv_bn_gate_act_branch(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias,
    const OptionalTensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, SymIntArrayRef padding, int64_t tile, double eps, Act act) {
  if (recorded(x)) {
    return Results<BranchOutputs>::from(ConvBnGateAct<true>::apply(
        x, conv_weight, conv_bias, gate, weight, bias, residual, padding, tile, eps, act));
  }
  auto [y, u, mean, var, aux] = handle<ConvBnGateActOp>().call(
      x, conv_weight, conv_bias, gate, weight, bias, residual, padding, tile, eps, act);
  return {y, u, mean, var, aux, x};
}

}  // namespace
}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CompositeImplicitAutograd, m) {
  m.impl("conv_bn_gate_act_branch", &pfs::conv_bn_gate_act_branch);
}

TORCH_LIBRARY_IMPL(pfs_fast, Autograd, m) {
  using namespace pfs;
  m.impl("bn_gate_act", &Differentiable<BnGateActOp, BnGateAct>::run);
  m.impl("frozen_conv", &Differentiable<FrozenConvOp, FrozenConv>::run);
  m.impl("winograd_conv", &Differentiable<WinogradConvOp, WinogradConv>::run);
  m.impl("max_pool", &Differentiable<MaxPoolOp, MaxPool>::run);
  m.impl("conv_bn_gate_act", &Differentiable<ConvBnGateActOp, ConvBnGateAct<false>>::run);
  m.impl("_bn_gate_act_backward", &DifferentiableNoMore<BnGateActGradOp>::run);
  m.impl("_frozen_conv_backward", &DifferentiableNoMore<FrozenConvGradOp>::run);
  m.impl("_winograd_conv_backward", &DifferentiableNoMore<WinogradConvGradOp>::run);
  m.impl("_max_pool_backward", &DifferentiableNoMore<MaxPoolGradOp>::run);
  m.impl("_conv_bn_gate_act_backward", &DifferentiableNoMore<ConvBnGateActGradOp>::run);
}
