// Runs the kernels of csrc/cuda on the host, one block after the other: each thread of a block is a
// fiber, and __syncthreads hands over to the next fiber. Include it before any header of csrc/cuda;
// it takes the place of launch.cuh.
//
// It finds wrong indexes, wrong arithmetic, barriers that not all threads reach, and results that
// depend on the order of threads or blocks (run in both orders). It does not find what only a GPU
// does: data races inside a warp, launch limits.
#pragma once

#define PFS_CUDA_EMULATION
#define PFS_CUDA_LAUNCH_CUH_

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace pfs_emulation {

// Last thread and last block first.
inline bool reverse_order = false;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* running = nullptr;
inline const std::function<void()>* thread_body = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

inline void fiber_main() {
  (*thread_body)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

inline void run_block(int num_threads, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (static_cast<int>(fibers.size()) < num_threads) fibers.push_back(std::make_unique<Fiber>());
  thread_body = &body;
  for (int t = 0; t < num_threads; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int num_done = 0; num_done < num_threads;) {
    num_done = 0;
    for (int i = 0; i < num_threads; ++i) {
      const int t = reverse_order ? num_threads - 1 - i : i;
      threadIdx = {static_cast<unsigned>(t), 0, 0};
      running = fibers[t].get();
      if (!running->done) swapcontext(&scheduler, &running->context);
      num_done += running->done;
    }
    // Between two barriers either all threads end or none does.
    if (num_done != 0 && num_done != num_threads) fail("some threads of a block missed a barrier");
  }
}

}  // namespace pfs_emulation

inline void __syncthreads() {
  swapcontext(&pfs_emulation::running->context, &pfs_emulation::scheduler);
}

namespace pfs::cuda {

class DeviceScope {
 public:
  template <typename Device>
  explicit DeviceScope(const Device&) {}
};

template <typename... Params, typename... Args>
void launch(const DeviceScope&, void (*kernel)(Params...), int64_t grid_x, int64_t grid_y,
            int threads, Args&&... args) {
  if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535)
    pfs_emulation::fail("no such grid");
  if (threads < 1 || threads > 1024) pfs_emulation::fail("no such block");
  gridDim = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  const std::function<void()> body = [&] { kernel(args...); };
  const int64_t num_blocks = grid_x * grid_y;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t block = pfs_emulation::reverse_order ? num_blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(block % grid_x), static_cast<unsigned>(block / grid_x), 0};
    pfs_emulation::run_block(threads, body);
  }
}

}  // namespace pfs::cuda
