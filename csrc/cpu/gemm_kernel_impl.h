// The table of gemm_kernel.h, compiled once per instruction set by gemm_kernel_<isa>.cpp.
#pragma once

#include "gemm.h"
#include "gemm_kernel.h"

namespace pfs::cpu {
namespace {

// Rows of all products against one panel of columns. last: place of its last vector in memory.
template <int kRows, int kVectors>
PFS_INLINE void sum_block(const Product* products, int64_t num_products, int64_t row, int64_t panel,
                          int64_t a_row, int64_t depth, const float* bias, float* c, int64_t c_row,
                          int64_t last) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) {
    const Floats first =
        bias == nullptr ? Floats{} : load_floats(bias + (v == kVectors - 1 ? last : v * kLanes));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) sum[r][v] = first;
  }
  for (int64_t p = 0; p < num_products; ++p) {
    add_products<kRows, kVectors>(sum, products[p].a + row * a_row, a_row,
                                  products[p].packed + panel * depth, depth);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      store_floats(c + r * c_row + (v == kVectors - 1 ? last : v * kLanes), sum[r][v]);
  }
}

template <int kVectors>
void sum_panel(const Product* products, int64_t num_products, int64_t panel, int64_t a_row,
               int64_t depth, const float* bias, float* c, int64_t c_row, int64_t rows,
               int64_t last) {
  const auto block = [&]<int kRows>(int64_t r) {
    sum_block<kRows, kVectors>(products, num_products, r, panel, a_row, depth, bias, c + r * c_row,
                               c_row, last);
  };
  int64_t r = 0;
  for (; r + kMaxRows<kVectors> <= rows; r += kMaxRows<kVectors>) {
    block.template operator()<kMaxRows<kVectors>>(r);
  }
  switch (rows - r) {
    case 1:
      return block.template operator()<1>(r);
    case 2:
      return block.template operator()<2>(r);
    case 3:
      return block.template operator()<3>(r);
    case 4:
      return block.template operator()<4>(r);
    case 5:
      return block.template operator()<5>(r);
    default:
      return;
  }
}

void multiply_sum(const Product* products, int64_t num_products, int64_t a_row, int64_t depth,
                  const float* bias, float* c, int64_t c_row, int64_t rows, int64_t width,
                  int64_t back) {
  for (int64_t n = 0, columns; n < width; n += columns) {
    columns = panel_width(width - n, kLanes);
    const int64_t last = columns - kLanes - (n + columns == width ? back : 0);
    const float* shift = bias == nullptr ? nullptr : bias + n;
    const auto panel = columns == kLanes       ? sum_panel<1>
                       : columns == 2 * kLanes ? sum_panel<2>
                                               : sum_panel<3>;
    panel(products, num_products, n, a_row, depth, shift, c + n, c_row, rows, last);
  }
}

constexpr GemmKernels gemm_kernels = {kLanes, multiply_sum};

}  // namespace
}  // namespace pfs::cpu
