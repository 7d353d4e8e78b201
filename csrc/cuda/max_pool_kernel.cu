// max_pool on CUDA: arguments and launches of the kernels in max_pool.cuh. Nothing here waits for
// the device.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "../pfs_ops.h"
#include "max_pool.cuh"
#include "tensors.cuh"

namespace pfs {
namespace {

using namespace pfs::cuda;

// Contiguous images as such of one channel.
PoolShape as_rows(PoolShape shape, at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) return shape;
  shape.batch *= shape.channels;
  shape.channels = 1;
  return shape;
}

// Calls run(V, index) with packs of V values where channels and addresses allow them, and an index
// type that holds `values` and a block beyond.
template <typename T, typename Run>
void dispatch_pool(const PoolShape& shape, bool aligned, int64_t values, const Run& run) {
  constexpr int64_t kSmall = (int64_t{1} << 31) - kMaxThreads;
  const auto with_pack = [&](auto pack) {
    values < kSmall ? run(pack, uint32_t{}) : run(pack, int64_t{});
  };
  aligned&& shape.channels % kPackSize<T> == 0 ? with_pack(Packed<kPackSize<T>>{})
                                               : with_pack(Packed<1>{});
}

int64_t num_blocks(int64_t threads) { return (threads + kMaxThreads - 1) / kMaxThreads; }

}  // namespace

MaxPoolOutputs max_pool_cuda(const at::Tensor& x_in, at::IntArrayRef kernel, at::IntArrayRef stride,
                             at::IntArrayRef padding) {
  const PoolShape sizes = checks::check_max_pool(x_in, kernel, stride, padding);
  const DeviceScope scope(x_in.device());
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const std::array<int64_t, 4> size{sizes.batch, sizes.channels, sizes.out_height, sizes.out_width};
  const at::Tensor y = at::empty(size, x.options().memory_format(format));
  const at::Tensor offsets = at::empty(size, x.options().dtype(at::kByte).memory_format(format));
  if (y.numel() == 0) return {y, offsets};
  const PoolShape shape = as_rows(sizes, format);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "max_pool", [&] {
    dispatch_pool<scalar_t>(
        shape, is_aligned({raw(x), raw(y), raw(offsets)}), y.numel(), [&](auto pack, auto index) {
          constexpr int V = decltype(pack)::value;
          using Index = decltype(index);
          const int64_t threads = y.numel() / V;
          launch(scope, max_pool_kernel<scalar_t, V, Index>, num_blocks(threads), 1, kMaxThreads,
                 typed<scalar_t>(x), shape, static_cast<Index>(threads), typed_mutable<scalar_t>(y),
                 typed_mutable<uint8_t>(offsets));
        });
  });
  return {y, offsets};
}

at::Tensor max_pool_backward_cuda(const at::Tensor& grad_y_in, const at::Tensor& offsets_in,
                                  at::IntArrayRef input_size, at::IntArrayRef kernel,
                                  at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolShape sizes =
      checks::check_max_pool_backward(grad_y_in, offsets_in, input_size, kernel, stride, padding);
  const DeviceScope scope(grad_y_in.device());
  const at::MemoryFormat format = offsets_in.suggest_memory_format();
  const at::Tensor grad_y = grad_y_in.contiguous(format), offsets = offsets_in.contiguous(format);
  const at::Tensor grad_x = at::empty(input_size, grad_y.options().memory_format(format));
  if (grad_x.numel() == 0) return grad_x;
  const PoolShape shape = as_rows(sizes, format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_y.scalar_type(), "_max_pool_backward", [&] {
        dispatch_pool<scalar_t>(
            shape, is_aligned({raw(grad_x), raw(grad_y), raw(offsets)}), grad_x.numel(),
            [&](auto pack, auto index) {
              constexpr int V = decltype(pack)::value;
              using Index = decltype(index);
              const int64_t threads = grad_x.numel() / V;
              launch(scope, max_pool_backward_kernel<scalar_t, V, Index>, num_blocks(threads), 1,
                     kMaxThreads, typed<scalar_t>(grad_y), typed<uint8_t>(offsets), shape,
                     static_cast<Index>(threads), typed_mutable<scalar_t>(grad_x));
            });
      });
  return grad_x;
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CUDA, m) {
  m.impl("max_pool", &pfs::max_pool_cuda);
  m.impl("_max_pool_backward", &pfs::max_pool_backward_cuda);
}
