// Memory that the operators of this package allocate and free again in every step of a loop, kept for
// its next step.
//
// PyTorch takes CPU memory from the C library, which returns much of it to the system when it is
// freed. The next step gets it back page by page, each one trapped into and cleared by the kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace pfs::cpu {

// While any KeptMemory exists, large blocks that were allocated inside enter() and exit() stay with
// the process when their tensors die, and serve later allocations inside; when the last one is
// destroyed, those that are free go back. Tensors may outlive all of it. One pool for the process;
// blocks kept and in use together stay below 1.5 times the most that was in use at once.
class KeptMemory {
 public:
  KeptMemory();
  ~KeptMemory();
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  void enter();
  void exit();

 private:
  int64_t entered_ = 0;
};

struct KeptBytes {
  int64_t in_use;  // by tensors
  int64_t free;    // kept for later
};
KeptBytes kept_bytes();

// at::empty, for the outputs of operators: from the pool inside enter() and exit().
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format);

// Working memory of an operator, from the same place.
c10::DataPtr allocate(size_t bytes);

}  // namespace pfs::cpu
