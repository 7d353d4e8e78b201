// Sizes of one max_pool, in plain C++ for the kernels of every device and instruction set.
#pragma once

#include <cstdint>

namespace pfs {

// A window has kernel_y * kernel_x taps, at most 255. Tap t reads row t / kernel_x and column t %
// kernel_x of it, counted from its corner, which may lie in the padding. That number is the offset
// that is kept for the backward pass.
struct PoolShape {
  int64_t batch, channels;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel_y, kernel_x;
  int64_t stride_y, stride_x;
  int64_t pad_y, pad_x;
};

}  // namespace pfs
