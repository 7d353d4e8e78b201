// The kernels of max_pool: one thread for a pack of V channels of one output (forward) or one input
// (backward). The backward pass gathers, so that it needs no atomics and repeats.
//
// Both layouts are one here: contiguous [N, C, H, W] is [N * C, H, W, 1].
#ifndef PFS_CUDA_MAX_POOL_CUH_
#define PFS_CUDA_MAX_POOL_CUH_

#include <cstdint>
#include <limits>

#include "../pool_shape.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace pfs::cuda {

// Index: of packs; 32 bits where they suffice, since a thread starts with divisions.
template <typename Index>
struct PoolPlace {
  Index image, row, column, pack;

  // Pack i of a dense [images, height, width, packs].
  C10_HOST_DEVICE PoolPlace(Index i, const PoolShape& s, int pack_size, Index height, Index width) {
    const Index packs = static_cast<Index>(s.channels / pack_size);
    pack = i % packs;
    i /= packs;
    column = i % width;
    i /= width;
    row = i % height;
    image = i / height;
  }
};

C10_HOST_DEVICE inline int64_t at_least(int64_t value, int64_t bound) {
  return value < bound ? bound : value;
}
C10_HOST_DEVICE inline int64_t at_most(int64_t value, int64_t bound) {
  return value > bound ? bound : value;
}

// A value replaces the maximum so far if it is larger or NaN, as in PyTorch.
template <typename T, int V, typename Index>
__global__ void __launch_bounds__(kMaxThreads)
    max_pool_kernel(const T* __restrict__ x, PoolShape s, Index size, T* __restrict__ y,
                    uint8_t* __restrict__ offsets) {
  using acc = acc_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= size) return;
  const PoolPlace<Index> place(static_cast<Index>(i), s, V, static_cast<Index>(s.out_height),
                               static_cast<Index>(s.out_width));
  const int64_t top = place.row * s.stride_y - s.pad_y;
  const int64_t left = place.column * s.stride_x - s.pad_x;
  const int64_t first_row = at_least(top, 0), last_row = at_most(top + s.kernel_y, s.height);
  const int64_t first_column = at_least(left, 0), last_column = at_most(left + s.kernel_x, s.width);
  const T* image = x + place.image * s.height * s.width * s.channels + place.pack * V;

  acc best[V];
  Pack<T, V> chosen;
  Pack<uint8_t, V> taps;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best[v] = -std::numeric_limits<acc>::infinity();
    chosen.values[v] = static_cast<T>(best[v]);
    taps.values[v] = static_cast<uint8_t>((first_row - top) * s.kernel_x + first_column - left);
  }
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t column = first_column; column < last_column; ++column) {
      const Pack<T, V> values = load_pack<V>(image + (row * s.width + column) * s.channels);
      const uint8_t tap = static_cast<uint8_t>((row - top) * s.kernel_x + column - left);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const acc value = static_cast<acc>(values.values[v]);
        if (value > best[v] || value != value) {
          best[v] = value;
          chosen.values[v] = values.values[v];
          taps.values[v] = tap;
        }
      }
    }
  }
  store_pack<V>(y + i * V, chosen);
  store_pack<V>(offsets + i * V, taps);
}

// Sum of the gradients of the windows that chose this value, in the order of the output.
template <typename T, int V, typename Index>
__global__ void __launch_bounds__(kMaxThreads)
    max_pool_backward_kernel(const T* __restrict__ grad_y, const uint8_t* __restrict__ offsets,
                             PoolShape s, Index size, T* __restrict__ grad_x) {
  using acc = acc_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= size) return;
  const PoolPlace<Index> place(static_cast<Index>(i), s, V, static_cast<Index>(s.height),
                               static_cast<Index>(s.width));
  const int64_t down = place.row + s.pad_y, right = place.column + s.pad_x;
  const int64_t first_row = down < s.kernel_y ? 0 : (down - s.kernel_y) / s.stride_y + 1;
  const int64_t first_column = right < s.kernel_x ? 0 : (right - s.kernel_x) / s.stride_x + 1;
  const int64_t last_row = at_most(down / s.stride_y, s.out_height - 1);
  const int64_t last_column = at_most(right / s.stride_x, s.out_width - 1);
  const int64_t image = place.image * s.out_height * s.out_width * s.channels + place.pack * V;

  acc sum[V] = {};
  for (int64_t row = first_row; row <= last_row; ++row) {
    for (int64_t column = first_column; column <= last_column; ++column) {
      const int64_t from = image + (row * s.out_width + column) * s.channels;
      const Pack<uint8_t, V> taps = load_pack<V>(offsets + from);
      const Pack<T, V> grads = load_pack<V>(grad_y + from);
      const int64_t tap = (down - row * s.stride_y) * s.kernel_x + right - column * s.stride_x;
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (taps.values[v] == tap) sum[v] += static_cast<acc>(grads.values[v]);
    }
  }
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(sum[v]);
  store_pack<V>(grad_x + i * V, result);
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_MAX_POOL_CUH_
