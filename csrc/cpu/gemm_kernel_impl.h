// The table of gemm_kernel.h, compiled once per instruction set by gemm_kernel_<isa>.cpp.
#pragma once

#include "gemm.h"
#include "gemm_kernel.h"

namespace pfs::cpu {
namespace {

void multiply_rows(const float* a, int64_t a_row, const float* packed, float* c, int64_t c_row,
                   int64_t rows, int64_t depth, int64_t width, bool add) {
  Fetch none(nullptr, nullptr, 1);
  multiply_packed(none, none, a, a_row, packed, c, c_row, rows, depth, width, add);
}

constexpr GemmKernels gemm_kernels = {kLanes, multiply_rows};

}  // namespace
}  // namespace pfs::cpu
