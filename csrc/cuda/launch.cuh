// The one way to launch a kernel: on the current stream of the tensor's device, checked, without
// waiting for it.
#ifndef PFS_CUDA_LAUNCH_CUH_
#define PFS_CUDA_LAUNCH_CUH_

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

namespace pfs::cuda {

// Makes the tensor's device current for as long as it lives. Streams of a capture are honoured:
// nothing here synchronises or allocates outside PyTorch's allocator.
class DeviceScope {
 public:
  explicit DeviceScope(c10::Device device)
      : guard_(device), stream_(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::CUDAStream stream() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

template <typename... Params, typename... Args>
void launch(const DeviceScope& scope, void (*kernel)(Params...), int64_t grid_x, int64_t grid_y,
            int threads, Args&&... args) {
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  kernel<<<grid, static_cast<unsigned>(threads), 0, scope.stream()>>>(std::forward<Args>(args)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_LAUNCH_CUH_
