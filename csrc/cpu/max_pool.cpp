// max_pool on the CPU: checks, layouts, threads. The arithmetic is in max_pool_kernel_impl.h.
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../pfs_ops.h"
#include "isa.h"
#include "kept_memory.h"
#include "shared_blocks.h"

namespace pfs {
namespace {

// Values of a window that are worth a thread's start, as in PyTorch's own loops.
constexpr int64_t kGrain = 32768;

const cpu::MaxPoolDtypeKernels& kernels_for(at::ScalarType type) {
  const cpu::Dtype dtype = type == at::kDouble     ? cpu::Dtype::kDouble
                           : type == at::kBFloat16 ? cpu::Dtype::kBFloat16
                                                   : cpu::Dtype::kFloat;
  return cpu::chosen_isa().max_pool->of[static_cast<int>(dtype)];
}

// Images of one channel lie in memory as planes, whatever the layout is called.
bool by_rows(const PoolShape& shape, at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast && shape.channels > 1;
}

// Calls run(first, last) on parts of [0, count), each item of which takes `values`.
template <class Run>
void for_each_part(int64_t count, int64_t values, const Run& run) {
  const int64_t size = std::max<int64_t>(kGrain / std::max<int64_t>(values, 1), 1);
  cpu::share_out(at::divup(count, size), [&](cpu::SharedBlocks::Share& share) {
    for (int64_t part; (part = share.next()) >= 0;) {
      run(part * size, std::min((part + 1) * size, count));
    }
  });
}

}  // namespace

MaxPoolOutputs max_pool_cpu(const at::Tensor& x_in, at::IntArrayRef kernel, at::IntArrayRef stride,
                            at::IntArrayRef padding) {
  const PoolShape shape = checks::check_max_pool(x_in, kernel, stride, padding);
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format);
  const std::array<int64_t, 4> size{shape.batch, shape.channels, shape.out_height, shape.out_width};
  const at::Tensor y = cpu::empty(size, x.scalar_type(), format);
  const at::Tensor offsets = cpu::empty(size, at::kByte, format);
  if (y.numel() == 0) return {y, offsets};
  const auto& kernels = kernels_for(x.scalar_type());
  const void* from = x.const_data_ptr();
  void* to = y.mutable_data_ptr();
  uint8_t* taps = offsets.mutable_data_ptr<uint8_t>();
  const int64_t window = shape.kernel_y * shape.kernel_x;
  if (by_rows(shape, format)) {
    for_each_part(shape.batch * shape.out_height, shape.out_width * shape.channels * window,
                  [&](int64_t first, int64_t last) {
                    kernels.forward_rows(shape, from, to, taps, first, last);
                  });
  } else {
    for_each_part(shape.batch * shape.channels, shape.out_height * shape.out_width * window,
                  [&](int64_t first, int64_t last) {
                    kernels.forward_planes(shape, from, to, taps, first, last);
                  });
  }
  return {y, offsets};
}

at::Tensor max_pool_backward_cpu(const at::Tensor& grad_y_in, const at::Tensor& offsets_in,
                                 at::IntArrayRef input_size, at::IntArrayRef kernel,
                                 at::IntArrayRef stride, at::IntArrayRef padding) {
  const PoolShape shape =
      checks::check_max_pool_backward(grad_y_in, offsets_in, input_size, kernel, stride, padding);
  const at::MemoryFormat format = offsets_in.suggest_memory_format();
  const at::Tensor grad_y = grad_y_in.contiguous(format), offsets = offsets_in.contiguous(format);
  const at::Tensor grad_x = cpu::empty(input_size, grad_y.scalar_type(), format);
  if (grad_x.numel() == 0) return grad_x;
  const auto& kernels = kernels_for(grad_y.scalar_type());
  const void* from = grad_y.const_data_ptr();
  const uint8_t* taps = offsets.const_data_ptr<uint8_t>();
  void* to = grad_x.mutable_data_ptr();
  if (by_rows(shape, format)) {
    for_each_part(shape.batch * shape.height, shape.width * shape.channels,
                  [&](int64_t first, int64_t last) {
                    kernels.backward_rows(shape, from, taps, to, first, last);
                  });
  } else {
    const int64_t plane = shape.height * shape.width;
    for_each_part(shape.batch * shape.channels, plane, [&](int64_t first, int64_t last) {
      c10::DataPtr sums;
      if (grad_y.scalar_type() == at::kBFloat16)
        sums = cpu::allocate(static_cast<size_t>(plane) * sizeof(float));
      kernels.backward_planes(shape, from, taps, to, static_cast<float*>(sums.get()), first, last);
    });
  }
  return grad_x;
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("max_pool", &pfs::max_pool_cpu);
  m.impl("_max_pool_backward", &pfs::max_pool_backward_cpu);
}
