// The raw-pointer kernels behind max_pool: one table of functions per instruction set.
//
// Plain C++ without ATen, for the reason that bn_gate_act_kernel.h gives.
#pragma once

#include <cstdint>

#include "../pool_shape.h"
#include "bn_gate_act_kernel.h"  // Dtype

namespace pfs::cpu {

// Rows: channels_last, [N, H, W, C]. Planes: contiguous, [N * C, H, W].
struct MaxPoolDtypeKernels {
  // Output rows [first, last) of N * out_height.
  void (*forward_rows)(const PoolShape&, const void* x, void* y, uint8_t* offsets, int64_t first,
                       int64_t last);
  // Planes [first, last) of N * C.
  void (*forward_planes)(const PoolShape&, const void* x, void* y, uint8_t* offsets, int64_t first,
                         int64_t last);
  // Input rows [first, last) of N * height; every value of them is written once.
  void (*backward_rows)(const PoolShape&, const void* grad_y, const uint8_t* offsets, void* grad_x,
                        int64_t first, int64_t last);
  // Planes [first, last) of N * C. scratch: [height * width] float, read by bfloat16 alone.
  void (*backward_planes)(const PoolShape&, const void* grad_y, const uint8_t* offsets,
                          void* grad_x, float* scratch, int64_t first, int64_t last);
};

// In the order of Dtype.
struct MaxPoolKernels {
  MaxPoolDtypeKernels of[kNumDtypes];
};

// Null where the file was compiled without its instruction set.
extern const MaxPoolKernels* const max_pool_baseline;
extern const MaxPoolKernels* const max_pool_avx2;
extern const MaxPoolKernels* const max_pool_avx512;

}  // namespace pfs::cpu
