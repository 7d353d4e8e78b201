// A register-blocked multiplication of float matrices by weights that are packed in panels.
//
// A block of a few rows and up to three vectors of columns stays in registers while it runs over the depth;
// the panel of weights that it reads stays in the first-level cache for all rows. Included by files
// that are compiled once per instruction set.
#pragma once

#include "gemm_kernel.h"
#include "tile.h"

namespace pfs::cpu {
namespace {

using Floats = Vec<float>::V;
constexpr int kLanes = Vec<float>::kLanes;

// Depth of a panel of weights: 2 * lanes * kDepth floats are half of a first-level cache of 32 KiB
// (AVX2).
constexpr int64_t kDepth = 256;

// Rows whose sums stay in registers: 12 sums, the weights and an input, of 16 registers.
template <int kVectors>
constexpr int kMaxRows = kVectors == 3 ? 4 : 6;

PFS_INLINE Floats load_floats(const float* p) {
  return *reinterpret_cast<const Vec<float>::Unaligned*>(p);
}
PFS_INLINE void store_floats(float* p, Floats v) {
  *reinterpret_cast<Vec<float>::Unaligned*>(p) = v;
}

// sum += a [kRows, depth] b [depth, kVectors * lanes]
template <int kRows, int kVectors>
PFS_INLINE void add_products(Floats (*sum)[kVectors], const float* a, int64_t a_row, const float* b,
                             int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Floats weight[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) weight[v] = load_floats(b + v * kLanes);
    b += kVectors * kLanes;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat<float>(a[r * a_row + k]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * weight[v];
    }
  }
}

// c [kRows, kVectors * lanes] (+)= a [kRows, depth] b [depth, kVectors * lanes]
template <int kRows, int kVectors>
PFS_INLINE void multiply_block(const float* a, int64_t a_row, const float* b, float* c,
                               int64_t c_row, int64_t depth, bool add) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = add ? load_floats(c + r * c_row + v * kLanes) : Floats{};
  }
  add_products<kRows, kVectors>(sum, a, a_row, b, depth);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store_floats(c + r * c_row + v * kLanes, sum[r][v]);
  }
}

// Fetches a range of memory line by line, a few lines at each call.
class Fetch {
 public:
  PFS_INLINE Fetch(const void* begin, const void* end, int64_t calls)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)),
        bytes_(((end_ - next_) / calls / kLine + 1) * kLine) {}
  PFS_INLINE void some() {
    const char* stop = end_ - next_ > bytes_ ? next_ + bytes_ : end_;
    for (; next_ < stop; next_ += kLine) __builtin_prefetch(next_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  const char* end_;
  int64_t bytes_;
};

// All rows against one panel.
template <int kVectors>
void multiply_panel(Fetch& first, Fetch& second, const float* a, int64_t a_row, const float* b,
                    float* c, int64_t c_row, int64_t rows, int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + kMaxRows<kVectors> <= rows; r += kMaxRows<kVectors>) {
    first.some();
    second.some();
    multiply_block<kMaxRows<kVectors>, kVectors>(a + r * a_row, a_row, b, c + r * c_row, c_row,
                                                 depth, add);
  }
  a += r * a_row;
  c += r * c_row;
  switch (rows - r) {
    case 1:
      return multiply_block<1, kVectors>(a, a_row, b, c, c_row, depth, add);
    case 2:
      return multiply_block<2, kVectors>(a, a_row, b, c, c_row, depth, add);
    case 3:
      return multiply_block<3, kVectors>(a, a_row, b, c, c_row, depth, add);
    case 4:
      return multiply_block<4, kVectors>(a, a_row, b, c, c_row, depth, add);
    case 5:
      return multiply_block<5, kVectors>(a, a_row, b, c, c_row, depth, add);
    default:
      return;
  }
}

// c [rows, width] (+)= a [rows, depth] packed. width: a multiple of lanes; packed: panels of columns
// (see panel_width), [depth][columns of the panel] each.
PFS_INLINE void multiply_packed(Fetch& first, Fetch& second, const float* a, int64_t a_row,
                                const float* packed, float* c, int64_t c_row, int64_t rows,
                                int64_t depth, int64_t width, bool add) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t span = depth - k < kDepth ? depth - k : kDepth;
    const bool more = add || k > 0;
    for (int64_t n = 0, columns; n < width; n += columns) {
      columns = panel_width(width - n, kLanes);
      const float* panel = packed + n * depth + k * columns;
      if (columns == 2 * kLanes) {
        multiply_panel<2>(first, second, a + k, a_row, panel, c + n, c_row, rows, span, more);
      } else if (columns == 3 * kLanes) {
        multiply_panel<3>(first, second, a + k, a_row, panel, c + n, c_row, rows, span, more);
      } else {
        multiply_panel<1>(first, second, a + k, a_row, panel, c + n, c_row, rows, span, more);
      }
    }
  }
}

}  // namespace
}  // namespace pfs::cpu
