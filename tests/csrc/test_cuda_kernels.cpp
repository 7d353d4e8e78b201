// The CUDA kernels of bn_gate_act on the host, against float64. Needs neither a GPU nor ATen.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

// clang-format off: the emulation comes first, it replaces what the kernels would include.
#include "cuda_emulation.h"
#include "expect.h"
#include "../../csrc/cuda/bn_gate_act_backward.cuh"
// clang-format on

namespace {

using namespace pfs;
using namespace pfs::cuda;

std::string describe(const Shape& s) {
  return (s.layout == Layout::kRows ? "rows " : "planes ") + std::to_string(s.outer) + " x " +
         std::to_string(s.channels) + " x " + std::to_string(s.plane);
}

// --- the walk over the tensor

template <Layout kLayout, int V>
void test_cursors_visit_every_value_once(const Shape& shape) {
  const Grid grid = make_grid(shape, V);
  std::vector<int> visits(shape.numel(), 0);
  bool channels_right = true;
  for (int64_t split = 0; split < grid.splits; ++split) {
    for (int64_t tile = 0; tile < grid.tiles; ++tile) {
      for (int thread = 0; thread < grid.threads(); ++thread) {
        Cursor<kLayout, V> cursor(grid, tile, split, thread);
        for (int i = 0; i < cursor.count(); ++i, cursor.advance()) {
          for (int v = 0; v < V; ++v) {
            ++visits.at(cursor.offset() + v);
            channels_right &= shape.channel_at(cursor.offset() + v) ==
                              cursor.channel() + v % Cursor<kLayout, V>::kChannels;
          }
        }
      }
    }
  }
  bool once = true;
  for (int n : visits) once &= n == 1;
  expect(once && channels_right, "cursors, V = " + std::to_string(V) + ", " + describe(shape));
}

// Offsets beyond 2^31, without the tensor: the last piece of the last block is the last of the
// tensor.
template <Layout kLayout, int V>
void test_cursors_reach_the_end_of_huge_tensors(const Shape& shape) {
  const Grid grid = make_grid(shape, V);
  int64_t visited = 0, last = -1;
  for (int64_t tile = 0; tile < grid.tiles; ++tile) {
    for (int64_t split = 0; split < grid.splits; ++split) {
      for (int thread = 0; thread < grid.threads(); ++thread) {
        Cursor<kLayout, V> cursor(grid, tile, split, thread);
        visited += cursor.count();
        if (tile + 1 < grid.tiles || split + 1 < grid.splits) continue;
        for (int i = 0; i < cursor.count(); ++i, cursor.advance())
          last = std::max(last, cursor.offset());
      }
    }
  }
  expect(visited * V == shape.numel() && last == shape.numel() - V,
         "huge cursors, " + describe(shape));
}

// --- the operator

template <typename T>
std::vector<T> draw(int64_t size, double mean, double deviation, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(mean, deviation);
  std::vector<T> values(size + 16 / sizeof(T));
  for (T& v : values) v = static_cast<T>(normal(generator));
  return values;
}

struct Case {
  Shape shape;
  Act act;
  bool has_residual;
  bool training;
  double mean;
};

template <typename T>
struct Result {
  std::vector<T> y, grad_x, grad_residual;
  std::vector<acc_t<T>> mean, var, grad_gate, grad_weight, grad_bias;
  std::vector<uint8_t> mask;
  std::vector<T> pre_act;
};

constexpr double kEps = 1e-5;

// Everything the host files do between the arguments and the launches.
template <typename T, Layout kLayout, int V, ActFamily kFamily>
struct Operator {
  using acc = acc_t<T>;
  const Case& c;
  const std::vector<T>&x, &residual, &grad_y;
  const std::vector<acc>&gate, &weight, &bias, &running_mean, &running_var;
  DeviceScope scope{0};

  static acc poison() { return std::numeric_limits<acc>::quiet_NaN(); }

  template <Epilogue kEpilogue>
  void apply(const std::vector<acc>& affine, Result<T>& r) const {
    const auto act = act_params<acc>(c.act);
    if constexpr (kEpilogue == Epilogue::kClampResidualMask) {
      const int64_t run = kLayout == Layout::kRows ? c.shape.channels : c.shape.plane;
      if (run % 8 != 0) {
        launch(scope, apply_masked_flat_kernel<T>, 3, 1, kMaxThreads, x.data(), residual.data(),
               affine.data(), act, c.shape, r.y.data(), r.mask.data());
        return;
      }
      const Grid grid = make_grid(c.shape, 8);
      launch(scope, apply_kernel<T, 8, kLayout, kEpilogue>, grid.tiles, grid.splits, grid.threads(),
             x.data(), residual.data(), affine.data(), act, grid, r.y.data(),
             static_cast<void*>(r.mask.data()));
    } else {
      const Grid grid = make_grid(c.shape, V);
      launch(scope, apply_kernel<T, V, kLayout, kEpilogue>, grid.tiles, grid.splits, grid.threads(),
             x.data(), residual.data(), affine.data(), act, grid, r.y.data(),
             static_cast<void*>(r.pre_act.data()));
    }
  }

  template <Source kSource>
  void backward(Result<T>& r, const void* aux) const {
    const int64_t channels = c.shape.channels;
    const Grid grid = make_grid(c.shape, V);
    const ChannelParams<acc> params{gate.data(), weight.data(), bias.data()};
    const auto act = act_params<acc>(c.act);
    std::vector<acc> partial(2 * grid.splits * channels, poison()),
        coefficients(kNumGradRows * channels + 4, poison());
    launch(scope, grad_sums_kernel<T, V, kLayout, kSource>, grid.tiles, grid.splits, grid.threads(),
           grad_y.data(), x.data(), aux, r.mean.data(), r.var.data(), params,
           static_cast<acc>(kEps), act, grid, partial.data());
    launch(scope, channel_grads_kernel<acc>, (channels + 7) / 8, 1, kMaxThreads, partial.data(),
           grid.splits, c.shape, r.mean.data(), r.var.data(), params, c.training,
           static_cast<acc>(kEps),
           ChannelGrads<acc>{r.grad_gate.data(), r.grad_weight.data(), r.grad_bias.data()},
           coefficients.data());
    launch(scope, apply_backward_kernel<T, V, kLayout, kSource>, grid.tiles, grid.splits,
           grid.threads(), grad_y.data(), x.data(), aux, coefficients.data(), act, c.training, grid,
           r.grad_x.data(), r.grad_residual.data());
  }

  Result<T> operator()() const {
    const int64_t channels = c.shape.channels;
    const std::vector<T> values(x.size(), static_cast<T>(poison()));
    const std::vector<acc> per_channel(channels, poison());
    Result<T> r{values,      values,      values,
                per_channel, per_channel, per_channel,
                per_channel, per_channel, std::vector<uint8_t>((c.shape.numel() + 7) / 8, 0xFF),
                values};
    const Grid grid = make_grid(c.shape, V);
    std::vector<acc> partial(2 * grid.splits * channels, poison()),
        affine(kNumAffineRows * channels + 4, poison());
    launch(scope, batch_moments_kernel<T, V, kLayout>, grid.tiles, grid.splits, grid.threads(),
           x.data(), grid, partial.data());
    launch(scope, channel_affine_kernel<T>, (channels + 7) / 8, 1, kMaxThreads, x.data(), grid,
           partial.data(), running_mean.data(), running_var.data(),
           ChannelParams<acc>{gate.data(), weight.data(), bias.data()}, c.training,
           static_cast<acc>(kEps), r.mean.data(), r.var.data(), affine.data());
    const AuxKind kind = aux_kind(c.act, c.has_residual);
    if constexpr (kFamily == ActFamily::kSmooth) {
      c.has_residual ? apply<Epilogue::kSmoothResidual>(affine, r)
                     : apply<Epilogue::kSmooth>(affine, r);
      kind == AuxKind::kPreAct ? backward<Source::kPreAct>(r, r.pre_act.data())
                               : backward<Source::kSmooth>(r, nullptr);
    } else {
      if (kind == AuxKind::kBitmask) {
        apply<Epilogue::kClampResidualMask>(affine, r);
        backward<Source::kMask>(r, r.mask.data());
      } else {
        c.has_residual ? apply<Epilogue::kClampResidual>(affine, r)
                       : apply<Epilogue::kClamp>(affine, r);
        backward<Source::kClamp>(r, nullptr);
      }
    }
    return r;
  }
};

struct Error {
  double squares = 0, reference = 0;
  void add(double value, double expected) {
    squares += (value - expected) * (value - expected);
    reference += expected * expected;
  }
  // NaN, left by an element that nobody wrote, fails every comparison.
  bool within(double tolerance, double floor) const {
    return std::sqrt(squares) <= tolerance * std::sqrt(reference) + floor;
  }
};

template <typename T, Layout kLayout, int V, ActFamily kFamily>
void test_operator_agrees_with_float64(const Case& c) {
  using acc = acc_t<T>;
  const Shape& s = c.shape;
  const int64_t numel = s.numel(), channels = s.channels, count = s.values_per_channel();
  const auto x = draw<T>(numel, c.mean, 1, 1), residual = draw<T>(numel, 0, 1, 2),
             grad_y = draw<T>(numel, 0, 1, 3);
  auto gate = draw<acc>(channels, 1, 0.3, 4);
  const auto weight = draw<acc>(channels, 1, 0.5, 5), bias = draw<acc>(channels, 0, 0.5, 6);
  const auto running_mean = draw<acc>(channels, c.mean, 0.1, 7),
             running_var = draw<acc>(channels, 2, 0.1, 8);
  gate[channels / 2] = 0;

  const Operator<T, kLayout, V, kFamily> op{c,      x,    residual,     grad_y,     gate,
                                            weight, bias, running_mean, running_var};
  pfs_emulation::reverse_order = false;
  const Result<T> r = op();
  pfs_emulation::reverse_order = true;
  const Result<T> again = op();
  const auto same = [](const auto& a, const auto& b, int64_t size) {
    bool equal = true;
    for (int64_t i = 0; i < size; ++i) equal &= a[i] == b[i];
    return equal;
  };
  const std::string name =
      describe(s) + ", V = " + std::to_string(V) + ", " + std::to_string(sizeof(T)) +
      " bytes, act " + std::to_string(static_cast<int>(c.act)) +
      (c.has_residual ? ", residual" : "") + (c.training ? ", training" : ", eval") + ", mean " +
      std::to_string(c.mean);
  expect(same(r.y, again.y, numel) && same(r.grad_x, again.grad_x, numel) &&
             same(r.grad_gate, again.grad_gate, channels),
         "order of threads matters: " + name);

  const double infinity = std::numeric_limits<double>::infinity();
  const auto act = act_params<double>(c.act);
  const auto d = [](auto v) { return static_cast<double>(v); };
  Error y, var, grad_x, grad_residual, grad_gate, grad_weight, grad_bias;
  double mean_error = 0;
  int64_t wrong_bits = 0;
  for (int64_t k = 0; k < channels; ++k) {
    std::vector<int64_t> at;
    for (int64_t i = 0; i < numel; ++i) {
      if (s.channel_at(i) == k) at.push_back(i);
    }
    double mean = d(running_mean[k]), variance = d(running_var[k]);
    if (c.training) {
      mean = variance = 0;
      for (int64_t i : at) mean += d(x[i]) / count;
      for (int64_t i : at) variance += (d(x[i]) - mean) * (d(x[i]) - mean) / count;
    }
    const double rstd = 1 / std::sqrt(variance + kEps);
    mean_error = std::max(mean_error, std::abs(d(r.mean[k]) - mean) * rstd);
    var.add(d(r.var[k]), variance);
    double s1 = 0, s2 = 0;
    std::vector<double> g(at.size());
    for (size_t j = 0; j < at.size(); ++j) {
      const int64_t i = at[j];
      const double xhat = (d(x[i]) - mean) * rstd;
      double z = gate[k] * (weight[k] * xhat + bias[k]) + (c.has_residual ? d(residual[i]) : 0);
      y.add(d(r.y[i]), activate<kFamily>(z, act));
      const AuxKind kind = aux_kind(c.act, c.has_residual);
      if (kFamily == ActFamily::kSmooth) {
        // The derivative is taken where the operator took it, so that rounding of a saved z is not
        // counted.
        if (kind == AuxKind::kPreAct) z = d(r.pre_act[i]);
      } else if (kind == AuxKind::kBitmask) {
        const bool bit = r.mask[i / 8] >> (i % 8) & 1;
        const double to_edge =
            std::min(std::abs(z), c.act == Act::kRelu6 ? std::abs(z - 6) : infinity);
        wrong_bits += bit != clamp_passes(z, act) && to_edge > 1e-3;
        z = bit ? 1 : -1;
      } else if (c.act != Act::kIdentity && std::abs(z) < 1e-5) {
        z = d(r.y[i]) > 0 ? 1 : -1;
      }
      g[j] = activate_backward<kFamily>(d(grad_y[i]), z, act);
      s1 += g[j];
      s2 += g[j] * xhat;
    }
    for (size_t j = 0; j < at.size(); ++j) {
      const double xhat = (d(x[at[j]]) - mean) * rstd;
      const double centred = c.training ? g[j] - s1 / count - xhat * s2 / count : g[j];
      grad_x.add(d(r.grad_x[at[j]]), gate[k] * weight[k] * rstd * centred);
      grad_residual.add(d(r.grad_residual[at[j]]), g[j]);
    }
    grad_gate.add(d(r.grad_gate[k]), weight[k] * s2 + bias[k] * s1);
    grad_weight.add(d(r.grad_weight[k]), gate[k] * s2);
    grad_bias.add(d(r.grad_bias[k]), gate[k] * s1);
  }
  if (aux_kind(c.act, c.has_residual) == AuxKind::kBitmask && numel % 8 != 0) {
    wrong_bits += r.mask.back() >> (numel % 8) != 0;
  }

  // One rounding of the result to T; sums in acc, whose rounding grows with a large mean.
  const bool is_double = sizeof(T) == 8;
  const double accumulated = (is_double ? 1e-13 : 1e-6) * (1 + c.mean / 10),
               rounded = sizeof(T) == 2 ? 4e-3 : accumulated;
  const double floor = accumulated * std::sqrt(static_cast<double>(numel));
  expect(mean_error <= accumulated, "mean: " + name);
  expect(var.within(accumulated, 0), "var: " + name);
  expect(y.within(rounded, floor), "y: " + name);
  expect(wrong_bits == 0, "mask: " + name);
  expect(grad_x.within(rounded, 10 * floor), "grad_x: " + name);
  expect(grad_residual.within(rounded, floor), "grad_residual: " + name);
  expect(grad_gate.within(10 * accumulated, 10 * floor), "grad_gate: " + name);
  expect(grad_weight.within(10 * accumulated, 10 * floor), "grad_weight: " + name);
  expect(grad_bias.within(10 * accumulated, 10 * floor), "grad_bias: " + name);
}

template <typename T, Layout kLayout, int V>
void test_shape(const Shape& shape) {
  test_cursors_visit_every_value_once<kLayout, V>(shape);
  int n = 0;
  for (Act act : {Act::kIdentity, Act::kRelu, Act::kRelu6, Act::kSilu, Act::kHardswish}) {
    for (bool has_residual : {false, true}) {
      const bool training = n++ % 3 != 2;
      const Case c{shape, act, has_residual, training, sizeof(T) == 2 ? 0.0 : n % 2 * 100.0};
      if (act_family(act) == ActFamily::kSmooth) {
        test_operator_agrees_with_float64<T, kLayout, V, ActFamily::kSmooth>(c);
      } else {
        test_operator_agrees_with_float64<T, kLayout, V, ActFamily::kClamp>(c);
      }
    }
  }
}

}  // namespace

int main() {
  constexpr Layout kRows = Layout::kRows, kPlanes = Layout::kPlanes;
  test_shape<float, kRows, 4>({kRows, 75, 24, 1});
  test_shape<float, kRows, 4>({kRows, 700, 12, 1});
  test_shape<float, kRows, 1>({kRows, 61, 7, 1});
  test_shape<float, kPlanes, 4>({kPlanes, 5, 6, 24});
  test_shape<float, kPlanes, 1>({kPlanes, 9, 5, 49});
  test_shape<c10::BFloat16, kRows, 8>({kRows, 300, 24, 1});
  test_shape<c10::BFloat16, kRows, 1>({kRows, 40, 35, 1});
  test_shape<c10::BFloat16, kPlanes, 8>({kPlanes, 40, 3, 64});
  test_shape<c10::Half, kRows, 8>({kRows, 33, 264, 1});
  test_shape<c10::Half, kPlanes, 8>({kPlanes, 3, 4, 16});
  test_shape<double, kRows, 1>({kRows, 50, 9, 1});
  test_shape<double, kPlanes, 1>({kPlanes, 1, 1, 5003});

  for (int64_t channels : {1, 3, 33, 65, 300}) {
    for (int64_t outer : {1, 2, 31, 2000}) {
      test_cursors_visit_every_value_once<kRows, 1>({kRows, outer, channels, 1});
      test_cursors_visit_every_value_once<kRows, 8>({kRows, outer, channels * 8, 1});
      test_cursors_visit_every_value_once<kPlanes, 1>({kPlanes, outer, channels, 7});
      test_cursors_visit_every_value_once<kPlanes, 4>({kPlanes, outer, channels, 12});
    }
  }
  const int64_t kHuge = (int64_t{1} << 31) + 8;
  test_cursors_reach_the_end_of_huge_tensors<kRows, 8>({kRows, kHuge / 8, 24, 1});
  test_cursors_reach_the_end_of_huge_tensors<kRows, 1>({kRows, kHuge / 7 + 1, 7, 1});
  test_cursors_reach_the_end_of_huge_tensors<kPlanes, 8>({kPlanes, 3, 2, kHuge});
  test_cursors_reach_the_end_of_huge_tensors<kPlanes, 1>({kPlanes, kHuge / 64, 64, 3});

  std::printf(num_failures == 0 ? "ok\n" : "%d checks failed\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
