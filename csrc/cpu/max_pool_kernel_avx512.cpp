// max_pool for AVX-512 F, BW, DQ and VL; compiled with the flags that csrc/sources.txt gives
// this file.
#include "max_pool_kernel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define PFS_VECTOR_BYTES 64
#include "max_pool_kernel_impl.h"

namespace pfs::cpu {

extern const MaxPoolKernels* const max_pool_avx512 = &max_pool_kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const MaxPoolKernels* const max_pool_avx512 = nullptr;

}  // namespace pfs::cpu

#endif
