// max_pool for what the compiler may assume of every processor of the architecture: 128-bit
// vectors.
#define PFS_VECTOR_BYTES 16
#include "max_pool_kernel_impl.h"

namespace pfs::cpu {

extern const MaxPoolKernels* const max_pool_baseline = &max_pool_kernels;

}  // namespace pfs::cpu
