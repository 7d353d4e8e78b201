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

struct GemmKernels {
  int64_t lanes;  // values of a vector

  // c [rows, width] (+)= a [rows, depth] packed [depth, width]. a_row, c_row: distances of rows.
  // width: a multiple of lanes. packed: panels of panel_width columns, one after another,
  // [depth][columns of the panel] each.
  void (*multiply)(const float* a, int64_t a_row, const float* packed, float* c, int64_t c_row,
                   int64_t rows, int64_t depth, int64_t width, bool add);
};

// Null where the file was compiled without its instruction set.
extern const GemmKernels* const gemm_baseline;
extern const GemmKernels* const gemm_avx2;
extern const GemmKernels* const gemm_avx512;

}  // namespace pfs::cpu
