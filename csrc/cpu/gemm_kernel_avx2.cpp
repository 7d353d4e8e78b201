// Matrix products for AVX2 and FMA; compiled with the flags that csrc/sources.txt gives this file.
#include "gemm_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)

#define PFS_VECTOR_BYTES 32
#include "gemm_kernel_impl.h"

namespace pfs::cpu {

extern const GemmKernels* const gemm_avx2 = &gemm_kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const GemmKernels* const gemm_avx2 = nullptr;

}  // namespace pfs::cpu

#endif
