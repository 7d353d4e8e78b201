// From tensors to what kernels take: shape and layout, raw pointers, pack size.
#ifndef PFS_CUDA_TENSORS_CUH_
#define PFS_CUDA_TENSORS_CUH_

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <type_traits>

#include "../checks.h"
#include "../pfs_ops.h"
#include "bn_gate_act_forward.cuh"
#include "geometry.cuh"
#include "launch.cuh"

namespace pfs::cuda {

inline Shape shape_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t channels = x.size(1);
  const int64_t per_channel = checks::values_per_channel(x);
  // One channel is one plane in either layout, and as such can be read in packs.
  if (channels == 1) return {Layout::kPlanes, 1, 1, per_channel};
  const int64_t spatial = per_channel / x.size(0);
  if (spatial == 1 || format != at::MemoryFormat::Contiguous)
    return {Layout::kRows, per_channel, channels, 1};
  return {Layout::kPlanes, x.size(0), channels, spatial};
}

// Values of the longest run inside which a pack may lie.
inline int64_t run_length(const Shape& shape) {
  return shape.layout == Layout::kRows ? shape.channels : shape.plane;
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

template <int V>
using Packed = std::integral_constant<int, V>;

// Calls f(layout, V) with V the pack size if the shape and the addresses allow packs, else 1.
template <int kPack, typename F>
void dispatch_layout(const Shape& shape, bool aligned, F&& f) {
  const bool packed = aligned && run_length(shape) % kPack == 0;
  const auto with_layout = [&](auto layout) {
    packed ? f(layout, Packed<kPack>{}) : f(layout, Packed<1>{});
  };
  if (shape.layout == Layout::kRows) {
    with_layout(std::integral_constant<Layout, Layout::kRows>{});
  } else {
    with_layout(std::integral_constant<Layout, Layout::kPlanes>{});
  }
}

inline const void* raw(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

template <typename T>
const T* typed(const at::Tensor& t) {
  return static_cast<const T*>(raw(t));
}

template <typename T>
T* typed_mutable(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Per-channel argument without gaps, or an undefined tensor.
inline at::Tensor dense(const OptionalTensor& t) {
  return checks::is_present(t) ? t->contiguous() : at::Tensor();
}

struct Params {
  at::Tensor gate, weight, bias;

  template <typename acc>
  ChannelParams<acc> pointers() const {
    return {typed<acc>(gate), typed<acc>(weight), typed<acc>(bias)};
  }
};

inline int64_t channel_blocks(int64_t channels) {
  return (channels + kChannelThreads - 1) / kChannelThreads;
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_TENSORS_CUH_
