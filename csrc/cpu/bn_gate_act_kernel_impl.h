// The kernels of bn_gate_act, compiled once per instruction set by bn_gate_act_kernel_<isa>.cpp.
#pragma once

#include "bn_gate_act_kernel.h"
#include "bn_gate_act_tile_ops.h"

namespace pfs::cpu {
namespace {

// Values that one accumulator lane of float may sum before it is added to double.
constexpr int64_t kMaxLaneSum = 128;
// Sums take a few rows at a time, column by column: enough rows to keep sums in registers for a
// while, so few that memory is still read almost in sequence.
constexpr int64_t kBlockBytes = 1024;
constexpr int64_t kMinBlockRows = 4;
// How far ahead of a sum memory is fetched.
constexpr int64_t kPrefetchBytes = 4096;

PFS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PFS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- walking over memory ----

// Applies op to values [begin, end) in memory order.
template <class T, class Op>
PFS_INLINE void walk(const Layout& layout, Op op, int64_t begin, int64_t end) {
  constexpr int64_t kT = kTile<T>;
  if (layout.period > 0) {
    for (int64_t row = begin; row < end; row += layout.period) {
      const int64_t count = min_of(layout.period, end - row);
      int64_t j = 0;
      for (; j + kT <= count; j += kT)
        op.template apply<true, true>(row + j, kT, op.template channel<true>(j));
      if (j < count)
        op.template apply<false, true>(row + j, count - j, op.template channel<true>(j));
    }
  } else {
    int64_t plane = begin / layout.inner;
    int64_t channel = plane % layout.channels;
    for (int64_t i = begin; i < end; ++plane) {
      const int64_t plane_end = min_of((plane + 1) * layout.inner, end);
      const auto c = op.template channel<false>(channel);
      for (; i + kT <= plane_end; i += kT) op.template apply<true, false>(i, kT, c);
      // What a whole tile writes beyond its plane is written again by the next plane, if that
      // belongs to this call.
      if (i < plane_end && i + kT <= end) {
        op.template apply<true, false>(i, plane_end - i, c);
      } else if (i < plane_end) {
        op.template apply<false, false>(i, plane_end - i, c);
      }
      i = plane_end;
      channel = channel + 1 == layout.channels ? 0 : channel + 1;
    }
  }
  op.finish();
}

// Adds `num_rows` rows from `begin` on to kTiles accumulator tiles at position j of a row.
template <class T, int kTiles, class Op>
PFS_INLINE void add_columns(const Op& op, int64_t begin, int64_t num_rows, int64_t period,
                            int64_t j, Acc<T>* sum1, Acc<T>* sum2) {
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
    for (int k = 0; k < kTiles; ++k) {
      const int64_t i = begin + r * period + j + k * kT;
      op.prefetch(i + kPrefetchBytes / static_cast<int64_t>(sizeof(T)));
      op.template add<true>(i, kT, c[k], s1[k], s2[k]);
    }
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

// Sums the rows of `unit` values in [begin, end) into totals1/2 [unit], in lane order; sums: 2 *
// unit values of scratch.
template <class T, class Op>
PFS_INLINE void sum_rows(const Layout& layout, const Op& op, int64_t begin, int64_t end,
                         double* totals1, double* totals2, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int64_t kT = kTile<T>;
  const int64_t period = layout.unit;
  A* sum1 = sums;
  A* sum2 = sums + period;
  std::memset(sums, 0, 2 * period * sizeof(A));
  std::memset(totals1, 0, period * sizeof(double));
  std::memset(totals2, 0, period * sizeof(double));
  const int64_t num_rows = (end - begin) / period;
  const int64_t block = min_of(
      kMaxLaneSum, max_of(kMinBlockRows, kBlockBytes / (period * static_cast<int64_t>(sizeof(T)))));
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
    for (; j + 2 * kT <= period; j += 2 * kT) {
      add_columns<T, 2>(op, begin + row * period, rows, period, j, sum1, sum2);
    }
    for (; j < period; j += kT)
      add_columns<T, 1>(op, begin + row * period, rows, period, j, sum1, sum2);
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
  const typename Vec<A>::V both = x.a + x.b;
  double total = 0;
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) total += static_cast<double>(both[lane]);
  return total;
}

// Sums values [begin, end) of one plane.
template <class T, class Op>
PFS_INLINE void sum_run(const Op& op, const typename Op::Channel& c, int64_t begin, int64_t end,
                        double& total1, double& total2) {
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

// ---- the entries of the table ----

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
  for_each_position<T>(layout, layout.unit, [&](int64_t c, int64_t, int64_t at) {
    expanded[at] = static_cast<Acc<T>>(values[c]);
  });
  for (int64_t at = layout.unit; at < layout.period; at += layout.unit)
    std::memcpy(expanded + at, expanded, layout.unit * sizeof(Acc<T>));
}

// The median of three: one outlier does no harm. V: a number or a vector of them.
template <class V>
PFS_INLINE V median(V x, V y, V z) {
  const V low = x < y ? x : y;
  const V high = x < y ? y : x;
  return z < low ? low : (z < high ? z : high);
}

// A value near which a position's values lie: the median of its first, middle and last row. Without
// a shift, float loses the variance of channels whose mean is far from 0.
template <class T>
PFS_INLINE void choose_pivots(const Layout& layout, const T* x, int64_t count, Acc<T>* pivot) {
  using A = Acc<T>;
  constexpr int64_t kT = kTile<T>;
  const int64_t rows = count / layout.unit;
  for (int64_t j = 0; j < layout.unit; j += kT) {
    if (rows == 0) {
      const int64_t n = max_of(0, min_of(kT, count - j));
      store_lanes(pivot + j, load_n<false>(x + (n > 0 ? j : 0), n, 0));
      continue;
    }
    const Tile<A> first = load(x + j);
    const Tile<A> middle = load(x + rows / 2 * layout.unit + j);
    const Tile<A> last = load(x + (rows - 1) * layout.unit + j);
    store_lanes(pivot + j,
                Tile<A>{median(first.a, middle.a, last.a), median(first.b, middle.b, last.b)});
  }
}

// As choose_pivots, for a run of n values.
template <class T>
PFS_INLINE Acc<T> run_pivot(const T* x, int64_t n) {
  return median(to_acc(x[0]), to_acc(x[n / 2]), to_acc(x[n - 1]));
}

template <class T>
void stats_rows(const Layout& layout, const void* x, int64_t begin, int64_t end, double* mean,
                double* m2, double* scratch) {
  using A = Acc<T>;
  const int64_t period = layout.unit;
  double* sum = scratch;
  double* sum_squares = scratch + period;
  double* shift = scratch + 2 * period;
  A* pivot = reinterpret_cast<A*>(scratch + 3 * period);
  A* sums = reinterpret_cast<A*>(scratch + 4 * period);
  choose_pivots(layout, static_cast<const T*>(x) + begin, end - begin, pivot);
  sum_rows<T>(layout, Stats<T>(x, pivot, layout.numel), begin, end, sum, sum_squares, sums);

  if (period == layout.channels && (end - begin) % period == 0) {
    const double per_count = static_cast<double>(period) / static_cast<double>(end - begin);
    for (int64_t c = 0; c < period; ++c) {
      const int64_t at = lane_position<T>(c);
      const double shifted_mean = sum[at] * per_count;
      mean[c] = static_cast<double>(pivot[at]) + shifted_mean;
      m2[c] = sum_squares[at] - sum[at] * shifted_mean;
    }
    return;
  }
  // Each position has its own mean and deviations. Those of one channel are merged around the mean
  // of its first position: with a reference that close nothing cancels.
  const int64_t rows = (end - begin) / period;
  const int64_t tail = (end - begin) % period;
  const auto values_at = [&](int64_t j) { return static_cast<double>(rows + (j < tail ? 1 : 0)); };
  const double per_row_count[2] = {1 / values_at(period), 1 / values_at(-1)};
  for (int64_t c = 0; c < layout.channels; ++c) {
    const int64_t first = c * layout.inner;
    const int64_t at = lane_position<T>(first);
    mean[c] = static_cast<double>(pivot[at]) + sum[at] * per_row_count[first < tail];
    m2[c] = 0;
    shift[c] = 0;
  }
  for_each_position<T>(layout, rows > 0 ? period : tail, [&](int64_t c, int64_t j, int64_t at) {
    const double n = values_at(j);
    const double position_mean = sum[at] * per_row_count[j < tail];
    const double delta = static_cast<double>(pivot[at]) + position_mean - mean[c];
    shift[c] += n * delta;
    m2[c] += sum_squares[at] - sum[at] * position_mean + n * delta * delta;
  });
  const double per_count = 1 / static_cast<double>((end - begin) / layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    m2[c] -= shift[c] * shift[c] * per_count;
    mean[c] += shift[c] * per_count;
  }
}

template <class T>
void stats_planes(const Layout& layout, const void* x, const PlaneRange& range, double* mean,
                  double* m2) {
  using A = Acc<T>;
  const T* values = static_cast<const T*>(x);
  const double count = static_cast<double>((range.n1 - range.n0) * (range.s1 - range.s0));
  for (int64_t c = range.c0; c < range.c1; ++c) {
    A pivot = 0;
    double sum = 0, sum_squares = 0;
    for (int64_t n = range.n0; n < range.n1; ++n) {
      const int64_t plane = (n * layout.channels + c) * layout.inner;
      const int64_t begin = plane + range.s0, end = plane + range.s1;
      if (n == range.n0) pivot = run_pivot(values + begin, end - begin);
      sum_run<T>(Stats<T>(x, nullptr, layout.numel), splat_tile(pivot), begin, end, sum,
                 sum_squares);
    }
    mean[c] = static_cast<double>(pivot) + sum / count;
    m2[c] = sum_squares - sum * (sum / count);
  }
}

template <class T, Act act, bool kResidual>
void forward(const Layout& layout, const ForwardArgs& args, int64_t begin, int64_t end) {
  walk<T>(layout, Forward<T, act, kResidual>(args, begin, layout.numel), begin, end);
}

template <class T, SlopeSource source>
void backward(const Layout& layout, const BackwardArgs& args, int64_t begin, int64_t end) {
  walk<T>(layout, Apply<T, source>(args, layout.numel), begin, end);
}

template <class T, SlopeSource source>
void reduce_rows(const Layout& layout, const BackwardArgs& args, int64_t begin, int64_t end,
                 double* sum_g, double* sum_gx, double* scratch) {
  double* totals_g = scratch;
  double* totals_gx = scratch + layout.unit;
  Acc<T>* sums = reinterpret_cast<Acc<T>*>(scratch + 2 * layout.unit);
  sum_rows<T>(layout, Reduce<T, source>(args, layout.numel), begin, end, totals_g, totals_gx, sums);
  std::memset(sum_g, 0, layout.channels * sizeof(double));
  std::memset(sum_gx, 0, layout.channels * sizeof(double));
  for_each_position<T>(layout, layout.unit, [&](int64_t c, int64_t, int64_t at) {
    sum_g[c] += totals_g[at];
    sum_gx[c] += totals_gx[at];
  });
}

template <class T, SlopeSource source>
void reduce_planes(const Layout& layout, const BackwardArgs& args, const PlaneRange& range,
                   double* sum_g, double* sum_gx) {
  const Reduce<T, source> op(args, layout.numel);
  for (int64_t c = range.c0; c < range.c1; ++c) sum_g[c] = sum_gx[c] = 0;
  for (int64_t n = range.n0; n < range.n1; ++n) {
    for (int64_t c = range.c0; c < range.c1; ++c) {
      const int64_t plane = (n * layout.channels + c) * layout.inner;
      sum_run<T>(op, op.template channel<false>(c), plane + range.s0, plane + range.s1, sum_g[c],
                 sum_gx[c]);
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
      {backward<T, S::kIdentity>, backward<T, S::kRelu>, backward<T, S::kRelu6>,
       backward<T, S::kSilu>, backward<T, S::kHardswish>, backward<T, S::kBitmask>,
       backward<T, S::kSavedSilu>, backward<T, S::kSavedHardswish>},
      {reduce_rows<T, S::kIdentity>, reduce_rows<T, S::kRelu>, reduce_rows<T, S::kRelu6>,
       reduce_rows<T, S::kSilu>, reduce_rows<T, S::kHardswish>, reduce_rows<T, S::kBitmask>,
       reduce_rows<T, S::kSavedSilu>, reduce_rows<T, S::kSavedHardswish>},
      {reduce_planes<T, S::kIdentity>, reduce_planes<T, S::kRelu>, reduce_planes<T, S::kRelu6>,
       reduce_planes<T, S::kSilu>, reduce_planes<T, S::kHardswish>, reduce_planes<T, S::kBitmask>,
       reduce_planes<T, S::kSavedSilu>, reduce_planes<T, S::kSavedHardswish>},
  };
}

// In the order of Dtype.
constexpr Kernels kernels = {{kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>()}};

}  // namespace
}  // namespace pfs::cpu
