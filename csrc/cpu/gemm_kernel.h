// Products of float matrices by packed weights: one table of functions per instruction set.
//
// Plain C++ without ATen, for the reason that bn_gate_act_kernel.h gives.
#pragma once

#include <cstdint>

namespace pfs::cpu {

struct GemmKernels {
  int64_t lanes;  // values of a vector

  // c [rows, width] (+)= a [rows, depth] packed [depth, width]. a_row, c_row: distances of rows.
  // width: a multiple of lanes. packed: panels of 2 * lanes columns (the last one perhaps of lanes),
  // [depth][columns of the panel] each.
  void (*multiply)(const float* a, int64_t a_row, const float* packed, float* c, int64_t c_row,
                   int64_t rows, int64_t depth, int64_t width, bool add);
};

// Null where the file was compiled without its instruction set.
extern const GemmKernels* const gemm_baseline;
extern const GemmKernels* const gemm_avx2;
extern const GemmKernels* const gemm_avx512;

}  // namespace pfs::cpu
