// max_pool for AVX2 and FMA; compiled with the flags that csrc/sources.txt gives this file.
#include "max_pool_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)

#define PFS_VECTOR_BYTES 32
#include "max_pool_kernel_impl.h"

namespace pfs::cpu {

extern const MaxPoolKernels* const max_pool_avx2 = &max_pool_kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const MaxPoolKernels* const max_pool_avx2 = nullptr;

}  // namespace pfs::cpu

#endif
