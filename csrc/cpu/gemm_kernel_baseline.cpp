// Matrix products for what the compiler may assume of every processor of the architecture: 128-bit
// vectors.
#define PFS_VECTOR_BYTES 16
#include "gemm_kernel_impl.h"

namespace pfs::cpu {

extern const GemmKernels* const gemm_baseline = &gemm_kernels;

}  // namespace pfs::cpu
