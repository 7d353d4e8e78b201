// Products of float matrices by packed weights: one table of functions per instruction set.
//
// Plain C++ without ATen, for the reason that bn_gate_act_kernel.h gives.
#pragma once

#include <cstdint>

namespace pfs::cpu {

// Columns of the next panel of weights where `left` are still to come: two vectors, but three at the
// end of an odd number, since the sums of a single one would wait for each other. Static: a file of
// another instruction set must not share it.
static inline int64_t panel_width(int64_t left, int64_t lanes) {
  return left < 2 * lanes || left == 3 * lanes ? left : 2 * lanes;
}

// One matrix product of a sum.
struct Product {
  const float* a;       // [rows, depth]
  const float* packed;  // [depth, width]: panels of panel_width columns, one after another
};

struct GemmKernels {
  int64_t lanes;  // values of a vector

  // c [rows, width] = bias + the sum of products, each [rows, depth] by [depth, width]. a_row, c_row:
  // distances of rows. width: a multiple of lanes; its last vector of columns goes to memory `back`
  // columns earlier, and so do those of the bias. bias: null or [width - back].
  void (*multiply)(const Product* products, int64_t num_products, int64_t a_row, int64_t depth,
                   const float* bias, float* c, int64_t c_row, int64_t rows, int64_t width,
                   int64_t back);
};

// Null where the file was compiled without its instruction set.
extern const GemmKernels* const gemm_baseline;
extern const GemmKernels* const gemm_avx2;
extern const GemmKernels* const gemm_avx512;

}  // namespace pfs::cpu
