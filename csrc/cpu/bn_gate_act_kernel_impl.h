// The kernels of bn_gate_act, compiled once per instruction set by bn_gate_act_kernel_<isa>.cpp.
#pragma once

#include "bn_gate_act_kernel.h"
#include "tile.h"

namespace pfs::cpu {
namespace {

// Values that one accumulator lane of float may sum before it is added to double.
constexpr int64_t kMaxLaneSum = 128;
// Rows are summed in blocks that fit comfortably in the first-level cache.
constexpr int64_t kBlockBytes = 16 * 1024;

PFS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PFS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// A parameter for one tile: from position `index` of a row, or of channel `index`.
template <bool kRows, class A>
PFS_INLINE Tile<A> parameter(const A* values, int64_t index) {
  if constexpr (kRows) return load_lanes(values + index);
  return splat_tile(values[index]);
}

// ---- what happens to a tile ---------------------------------------------------------------------------------------------------

template <class A>
struct Affine {
  Tile<A> mean, scale, shift;
};

// The one place where z is computed: backward must decide as forward did on which side of 0 it lies.
template <class A>
PFS_INLINE Tile<A> affine(Tile<A> x, const Affine<A>& c) {
  return muladd(x - c.mean, c.scale, c.shift);
}

template <class T>
class Stats {
 public:
  using A = Acc<T>;
  using Channel = Tile<A>;
  Stats(const void* x, const A* pivot) : x_(static_cast<const T*>(x)), pivot_(pivot) {}

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t index) const {
    return parameter<kRows>(pivot_, index);
  }
  template <bool kFull>
  PFS_INLINE void add(int64_t i, int64_t n, const Channel& pivot, Tile<A>& sum, Tile<A>& sum_squares) const {
    Tile<A> d = load_n<kFull>(x_ + i, n) - pivot;
    if (!kFull) d = keep(d, bits_to_mask<T>(low_bits(n)));
    sum = sum + d;
    sum_squares = muladd(d, d, sum_squares);
  }

 private:
  const T* x_;
  const A* pivot_;
};

template <class T, Act act, bool kResidual>
class Forward {
 public:
  using A = Acc<T>;
  using Channel = Affine<A>;
  static constexpr AuxKind kAux =
      !kResidual || act == Act::kIdentity
          ? AuxKind::kNone
          : (act == Act::kRelu || act == Act::kRelu6 ? AuxKind::kBitmask : AuxKind::kPreAct);

  Forward(const ForwardArgs& args, int64_t begin)
      : args_(args), bits_(kAux == AuxKind::kBitmask ? static_cast<uint8_t*>(args.aux) + begin / 8 : nullptr) {}

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    return {parameter<kRows>(static_cast<const A*>(args_.mean), i),
            parameter<kRows>(static_cast<const A*>(args_.scale), i),
            parameter<kRows>(static_cast<const A*>(args_.shift), i)};
  }
  template <bool kFull>
  PFS_INLINE void apply(int64_t i, int64_t n, const Channel& c) {
    Tile<A> z = affine(load_n<kFull>(static_cast<const T*>(args_.x) + i, n), c);
    if constexpr (kResidual) z = z + load_n<kFull>(static_cast<const T*>(args_.residual) + i, n);
    if constexpr (kAux == AuxKind::kBitmask) bits_.put(mask_to_bits<T>(slope_mask<act>(z)), n);
    if constexpr (kAux == AuxKind::kPreAct) store_n<kFull>(static_cast<T*>(args_.aux) + i, z, n);
    store_n<kFull>(static_cast<T*>(args_.y) + i, Tile<A>{activate<act>(z.a), activate<act>(z.b)}, n);
  }
  PFS_INLINE void finish() {
    if constexpr (kAux == AuxKind::kBitmask) bits_.finish();
  }

 private:
  const ForwardArgs args_;
  BitWriter bits_;
};

// g = grad_y * act'(z), and what is made of it in the two passes of backward.
template <class T, SlopeSource source>
class Backward {
 public:
  using A = Acc<T>;
  struct Channel {
    Affine<A> affine;
    Tile<A> centred_factor, offset;
  };
  static constexpr bool kRecomputes = source == SlopeSource::kRelu || source == SlopeSource::kRelu6 ||
                                      source == SlopeSource::kSilu || source == SlopeSource::kHardswish;

  explicit Backward(const BackwardArgs& args) : args_(args) {}

  PFS_INLINE const A* values(const void* p) const { return static_cast<const A*>(p); }

  template <bool kFull>
  PFS_INLINE Tile<A> slope_times_grad(int64_t i, int64_t n, Tile<A> x, const Affine<A>& c) const {
    const Tile<A> grad = load_n<kFull>(static_cast<const T*>(args_.grad_y) + i, n);
    if constexpr (kRecomputes) return times_slope<static_cast<Act>(source)>(grad, affine(x, c));
    if constexpr (source == SlopeSource::kBitmask) {
      return keep(grad, bits_to_mask<T>(read_bits<kFull, T>(static_cast<const uint8_t*>(args_.aux), i, n)));
    }
    if constexpr (source == SlopeSource::kSavedSilu || source == SlopeSource::kSavedHardswish) {
      constexpr Act act = source == SlopeSource::kSavedSilu ? Act::kSilu : Act::kHardswish;
      return times_slope<act>(grad, load_n<kFull>(static_cast<const T*>(args_.aux) + i, n));
    }
    return grad;
  }

 protected:
  const BackwardArgs args_;
};

template <class T, SlopeSource source>
class Reduce : public Backward<T, source> {
 public:
  using A = Acc<T>;
  using Channel = Affine<A>;
  using Backward<T, source>::Backward;

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    const BackwardArgs& args = this->args_;
    return {parameter<kRows>(this->values(args.mean), i), parameter<kRows>(this->values(args.scale), i),
            parameter<kRows>(this->values(args.shift), i)};
  }
  template <bool kFull>
  PFS_INLINE void add(int64_t i, int64_t n, const Channel& c, Tile<A>& sum_g, Tile<A>& sum_gx) const {
    const Tile<A> x = load_n<kFull>(static_cast<const T*>(this->args_.x) + i, n);
    const Tile<A> g = this->template slope_times_grad<kFull>(i, n, x, c);
    sum_g = sum_g + g;
    sum_gx = muladd(g, x - c.mean, sum_gx);
  }
};

template <class T, SlopeSource source>
class Apply : public Backward<T, source> {
 public:
  using A = Acc<T>;
  using Base = Backward<T, source>;
  using Channel = typename Base::Channel;
  using Base::Base;

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    const BackwardArgs& args = this->args_;
    Channel c;
    c.affine = {parameter<kRows>(this->values(args.mean), i), parameter<kRows>(this->values(args.scale), i),
                parameter<kRows>(this->values(args.shift), i)};
    c.centred_factor = parameter<kRows>(this->values(args.centred_factor), i);
    c.offset = parameter<kRows>(this->values(args.offset), i);
    return c;
  }
  template <bool kFull>
  PFS_INLINE void apply(int64_t i, int64_t n, const Channel& c) const {
    const BackwardArgs& args = this->args_;
    const Tile<A> x = load_n<kFull>(static_cast<const T*>(args.x) + i, n);
    const Tile<A> g = this->template slope_times_grad<kFull>(i, n, x, c.affine);
    if (args.grad_residual != nullptr) store_n<kFull>(static_cast<T*>(args.grad_residual) + i, g, n);
    if (args.grad_x == nullptr) return;
    Tile<A> grad_x = c.affine.scale * g;
    if (args.training) grad_x = muladd(c.affine.scale, g, muladd(x - c.affine.mean, c.centred_factor, c.offset));
    store_n<kFull>(static_cast<T*>(args.grad_x) + i, grad_x, n);
  }
  PFS_INLINE void finish() const {}
};

// ---- walking over memory ------------------------------------------------------------------------------------------------------

// Applies op to values [begin, end) in memory order.
template <class T, class Op>
PFS_INLINE void walk(const Layout& layout, Op op, int64_t begin, int64_t end) {
  constexpr int64_t kT = kTile<T>;
  if (layout.period > 0) {
    for (int64_t row = begin; row < end; row += layout.period) {
      const int64_t count = min_of(layout.period, end - row);
      int64_t j = 0;
      for (; j + kT <= count; j += kT) op.template apply<true>(row + j, kT, op.template channel<true>(j));
      if (j < count) op.template apply<false>(row + j, count - j, op.template channel<true>(j));
    }
  } else {
    int64_t plane = begin / layout.inner;
    int64_t channel = plane % layout.channels;
    for (int64_t i = begin; i < end; ++plane) {
      const int64_t plane_end = min_of((plane + 1) * layout.inner, end);
      const auto c = op.template channel<false>(channel);
      for (; i + kT <= plane_end; i += kT) op.template apply<true>(i, kT, c);
      if (i < plane_end) op.template apply<false>(i, plane_end - i, c);
      i = plane_end;
      channel = channel + 1 == layout.channels ? 0 : channel + 1;
    }
  }
  op.finish();
}

// Adds `num_rows` rows from `begin` on to kTiles accumulator tiles at position j of a row.
template <class T, int kTiles, class Op>
PFS_INLINE void add_columns(const Op& op, int64_t begin, int64_t num_rows, int64_t period, int64_t j, Acc<T>* sum1,
                            Acc<T>* sum2) {
  constexpr int64_t kT = kTile<T>;
  Tile<Acc<T>> s1[kTiles], s2[kTiles];
  typename Op::Channel c[kTiles];
#pragma GCC unroll 4
  for (int k = 0; k < kTiles; ++k) {
    s1[k] = load_lanes(sum1 + j + k * kT);
    s2[k] = load_lanes(sum2 + j + k * kT);
    c[k] = op.template channel<true>(j + k * kT);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kTiles; ++k) op.template add<true>(begin + r * period + j + k * kT, kT, c[k], s1[k], s2[k]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kTiles; ++k) {
    store_lanes(sum1 + j + k * kT, s1[k]);
    store_lanes(sum2 + j + k * kT, s2[k]);
  }
}

template <class A>
PFS_INLINE void flush(A* sums, int64_t count, double* totals) {
  for (int64_t j = 0; j < count; ++j) totals[j] += static_cast<double>(sums[j]);
  std::memset(sums, 0, count * sizeof(A));
}

// Sums the rows of values [begin, end) into totals1/2 [period], in lane order; sums: 2 * period values of scratch.
template <class T, int kTiles, class Op>
PFS_INLINE void sum_rows(const Layout& layout, const Op& op, int64_t begin, int64_t end, double* totals1, double* totals2,
                         Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int64_t kT = kTile<T>;
  const int64_t period = layout.period;
  A* sum1 = sums;
  A* sum2 = sums + period;
  std::memset(sums, 0, 2 * period * sizeof(A));
  std::memset(totals1, 0, period * sizeof(double));
  std::memset(totals2, 0, period * sizeof(double));
  const int64_t num_rows = (end - begin) / period;
  const int64_t block = min_of(kMaxLaneSum, max_of(4, kBlockBytes / (period * static_cast<int64_t>(sizeof(T)))));
  int64_t in_lane = 0;
  for (int64_t row = 0; row < num_rows; row += block) {
    const int64_t rows = min_of(block, num_rows - row);
    if (in_lane + rows > kMaxLaneSum) {
      flush(sum1, period, totals1);
      flush(sum2, period, totals2);
      in_lane = 0;
    }
    in_lane += rows;
    int64_t j = 0;
    for (; j + kTiles * kT <= period; j += kTiles * kT) {
      add_columns<T, kTiles>(op, begin + row * period, rows, period, j, sum1, sum2);
    }
    for (; j < period; j += kT) add_columns<T, 1>(op, begin + row * period, rows, period, j, sum1, sum2);
  }
  flush(sum1, period, totals1);
  flush(sum2, period, totals2);
  const int64_t last = begin + num_rows * period;
  int64_t j = 0;
  for (; j + kT <= end - last; j += kT) add_columns<T, 1>(op, last, 1, period, j, sum1, sum2);
  if (j < end - last) {
    Tile<A> s1 = load_lanes(sum1 + j), s2 = load_lanes(sum2 + j);
    op.template add<false>(last + j, end - last - j, op.template channel<true>(j), s1, s2);
    store_lanes(sum1 + j, s1);
    store_lanes(sum2 + j, s2);
  }
  flush(sum1, period, totals1);
  flush(sum2, period, totals2);
}

template <class A>
PFS_INLINE double sum_of_lanes(Tile<A> x) {
  double total = 0;
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) total += static_cast<double>(x.a[lane]) + static_cast<double>(x.b[lane]);
  return total;
}

// Sums values [begin, end) of one plane.
template <class T, class Op>
PFS_INLINE void sum_run(const Op& op, const typename Op::Channel& c, int64_t begin, int64_t end, double& total1,
                        double& total2) {
  using A = Acc<T>;
  constexpr int64_t kT = kTile<T>;
  int64_t i = begin;
  while (i < end) {
    const int64_t stop = min_of(end, i + 2 * kMaxLaneSum * kT);
    Tile<A> s1[2] = {}, s2[2] = {};
    for (; i + 2 * kT <= stop; i += 2 * kT) {
      op.template add<true>(i, kT, c, s1[0], s2[0]);
      op.template add<true>(i + kT, kT, c, s1[1], s2[1]);
    }
    if (i + kT <= stop) {
      op.template add<true>(i, kT, c, s1[0], s2[0]);
      i += kT;
    }
    if (i < stop) {
      op.template add<false>(i, stop - i, c, s1[1], s2[1]);
      i = stop;
    }
    total1 += sum_of_lanes(s1[0] + s1[1]);
    total2 += sum_of_lanes(s2[0] + s2[1]);
  }
}

// ---- the entries of the table -------------------------------------------------------------------------------------------------

template <class T>
PFS_INLINE int64_t lane_position(int64_t j) {
  return j / kTile<T> * kTile<T> + lane_of<T>(j % kTile<T>);
}

// Calls f(channel, j, j in lane order) for the positions j in [0, count) of a row.
template <class T, class F>
PFS_INLINE void for_each_position(const Layout& layout, int64_t count, F f) {
  for (int64_t j = 0; j < count;) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      for (int64_t i = 0; i < layout.inner && j < count; ++i, ++j) f(c, j, lane_position<T>(j));
    }
  }
}

template <class T>
void expand(const Layout& layout, const double* values, void* out) {
  auto* expanded = static_cast<Acc<T>*>(out);
  if (layout.period == 0) {
    for (int64_t c = 0; c < layout.channels; ++c) expanded[c] = static_cast<Acc<T>>(values[c]);
    return;
  }
  for_each_position<T>(layout, layout.period,
                       [&](int64_t c, int64_t, int64_t at) { expanded[at] = static_cast<Acc<T>>(values[c]); });
}

// A value near which the position's values lie: the mean of its first rows. Without a shift, float loses the variance of
// channels whose mean is far from 0.
template <class T>
PFS_INLINE void choose_pivots(const Layout& layout, const T* x, int64_t count, Acc<T>* pivot) {
  using A = Acc<T>;
  constexpr int64_t kT = kTile<T>;
  const int64_t rows = min_of(4, count / layout.period);
  for (int64_t j = 0; j < layout.period; j += kT) {
    if (rows == 0) {
      const int64_t n = max_of(0, min_of(kT, count - j));
      store_lanes(pivot + j, load_n<false>(x + (n > 0 ? j : 0), n));
      continue;
    }
    const Tile<A> first = load(x + j);
    Tile<A> d = splat_tile(A(0));
    for (int64_t r = 1; r < rows; ++r) d = d + (load(x + r * layout.period + j) - first);
    store_lanes(pivot + j, muladd(d, splat_tile(A(1) / static_cast<A>(rows)), first));
  }
}

template <class T>
PFS_INLINE Acc<T> run_pivot(const T* x, int64_t n) {
  using A = Acc<T>;
  const A first = load_n<false>(x, 1).a[0];
  const Tile<A> d = keep(load_n<false>(x, n) - splat_tile(first), bits_to_mask<T>(low_bits(n)));
  return first + static_cast<A>(sum_of_lanes(d) / static_cast<double>(n));
}

template <class T>
void stats_rows(const Layout& layout, const void* x, int64_t begin, int64_t end, double* mean, double* m2, double* scratch) {
  using A = Acc<T>;
  const int64_t period = layout.period;
  double* sum = scratch;
  double* sum_squares = scratch + period;
  double* shift = scratch + 2 * period;
  A* pivot = reinterpret_cast<A*>(scratch + 3 * period);
  A* sums = reinterpret_cast<A*>(scratch + 4 * period);
  choose_pivots(layout, static_cast<const T*>(x) + begin, end - begin, pivot);
  sum_rows<T, 2>(layout, Stats<T>(x, pivot), begin, end, sum, sum_squares, sums);

  // Each position has its own mean and deviations. Those of one channel are merged around the mean of its first position: with a
  // reference that close nothing cancels.
  const int64_t rows = (end - begin) / period;
  const int64_t tail = (end - begin) % period;
  for (int64_t c = 0; c < layout.channels; ++c) {
    const int64_t first = c * layout.inner;
    const int64_t at = lane_position<T>(first);
    mean[c] = static_cast<double>(pivot[at]) + sum[at] / static_cast<double>(rows + (first < tail ? 1 : 0));
    m2[c] = 0;
    shift[c] = 0;
  }
  for_each_position<T>(layout, rows > 0 ? period : tail, [&](int64_t c, int64_t j, int64_t at) {
    const double n = static_cast<double>(rows + (j < tail ? 1 : 0));
    const double position_mean = sum[at] / n;
    const double delta = static_cast<double>(pivot[at]) + position_mean - mean[c];
    shift[c] += n * delta;
    m2[c] += sum_squares[at] - sum[at] * position_mean + n * delta * delta;
  });
  const double count = static_cast<double>((end - begin) / layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    m2[c] -= shift[c] * shift[c] / count;
    mean[c] += shift[c] / count;
  }
}

template <class T>
void stats_planes(const Layout& layout, const void* x, const PlaneRange& range, double* mean, double* m2) {
  using A = Acc<T>;
  const T* values = static_cast<const T*>(x);
  const double count = static_cast<double>((range.n1 - range.n0) * (range.s1 - range.s0));
  for (int64_t c = range.c0; c < range.c1; ++c) {
    A pivot = 0;
    double sum = 0, sum_squares = 0;
    for (int64_t n = range.n0; n < range.n1; ++n) {
      const int64_t plane = (n * layout.channels + c) * layout.inner;
      const int64_t begin = plane + range.s0, end = plane + range.s1;
      if (n == range.n0) pivot = run_pivot(values + begin, min_of(end - begin, kTile<T>));
      sum_run<T>(Stats<T>(x, nullptr), splat_tile(pivot), begin, end, sum, sum_squares);
    }
    mean[c] = static_cast<double>(pivot) + sum / count;
    m2[c] = sum_squares - sum * (sum / count);
  }
}

template <class T, Act act, bool kResidual>
void forward(const Layout& layout, const ForwardArgs& args, int64_t begin, int64_t end) {
  walk<T>(layout, Forward<T, act, kResidual>(args, begin), begin, end);
}

template <class T, SlopeSource source>
void backward(const Layout& layout, const BackwardArgs& args, int64_t begin, int64_t end) {
  walk<T>(layout, Apply<T, source>(args), begin, end);
}

template <class T, SlopeSource source>
void reduce_rows(const Layout& layout, const BackwardArgs& args, int64_t begin, int64_t end, double* sum_g, double* sum_gx,
                 double* scratch) {
  double* totals_g = scratch;
  double* totals_gx = scratch + layout.period;
  Acc<T>* sums = reinterpret_cast<Acc<T>*>(scratch + 2 * layout.period);
  sum_rows<T, 1>(layout, Reduce<T, source>(args), begin, end, totals_g, totals_gx, sums);
  std::memset(sum_g, 0, layout.channels * sizeof(double));
  std::memset(sum_gx, 0, layout.channels * sizeof(double));
  for_each_position<T>(layout, layout.period, [&](int64_t c, int64_t, int64_t at) {
    sum_g[c] += totals_g[at];
    sum_gx[c] += totals_gx[at];
  });
}

template <class T, SlopeSource source>
void reduce_planes(const Layout& layout, const BackwardArgs& args, const PlaneRange& range, double* sum_g, double* sum_gx) {
  const Reduce<T, source> op(args);
  for (int64_t c = range.c0; c < range.c1; ++c) sum_g[c] = sum_gx[c] = 0;
  for (int64_t n = range.n0; n < range.n1; ++n) {
    for (int64_t c = range.c0; c < range.c1; ++c) {
      const int64_t plane = (n * layout.channels + c) * layout.inner;
      sum_run<T>(op, op.template channel<false>(c), plane + range.s0, plane + range.s1, sum_g[c], sum_gx[c]);
    }
  }
}

template <class T>
constexpr DtypeKernels kernels_of() {
  using S = SlopeSource;
  return {
      kTile<T>,
      expand<T>,
      stats_rows<T>,
      stats_planes<T>,
      {{forward<T, Act::kIdentity, false>, forward<T, Act::kIdentity, true>},
       {forward<T, Act::kRelu, false>, forward<T, Act::kRelu, true>},
       {forward<T, Act::kRelu6, false>, forward<T, Act::kRelu6, true>},
       {forward<T, Act::kSilu, false>, forward<T, Act::kSilu, true>},
       {forward<T, Act::kHardswish, false>, forward<T, Act::kHardswish, true>}},
      {backward<T, S::kIdentity>, backward<T, S::kRelu>, backward<T, S::kRelu6>, backward<T, S::kSilu>,
       backward<T, S::kHardswish>, backward<T, S::kBitmask>, backward<T, S::kSavedSilu>, backward<T, S::kSavedHardswish>},
      {reduce_rows<T, S::kIdentity>, reduce_rows<T, S::kRelu>, reduce_rows<T, S::kRelu6>, reduce_rows<T, S::kSilu>,
       reduce_rows<T, S::kHardswish>, reduce_rows<T, S::kBitmask>, reduce_rows<T, S::kSavedSilu>,
       reduce_rows<T, S::kSavedHardswish>},
      {reduce_planes<T, S::kIdentity>, reduce_planes<T, S::kRelu>, reduce_planes<T, S::kRelu6>,
       reduce_planes<T, S::kSilu>, reduce_planes<T, S::kHardswish>, reduce_planes<T, S::kBitmask>,
       reduce_planes<T, S::kSavedSilu>, reduce_planes<T, S::kSavedHardswish>},
  };
}

// In the order of Dtype.
constexpr Kernels kernels = {{kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>()}};

}  // namespace
}  // namespace pfs::cpu
