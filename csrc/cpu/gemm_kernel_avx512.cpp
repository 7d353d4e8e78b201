// Matrix products for AVX-512 F, BW, DQ and VL; compiled with the flags that csrc/sources.txt gives
// this file.
#include "gemm_kernel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define PFS_VECTOR_BYTES 64
#include "gemm_kernel_impl.h"

namespace pfs::cpu {

extern const GemmKernels* const gemm_avx512 = &gemm_kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const GemmKernels* const gemm_avx512 = nullptr;

}  // namespace pfs::cpu

#endif
