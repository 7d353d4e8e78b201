// winograd_conv for AVX-512 F, BW, DQ and VL; compiled with the flags that csrc/sources.txt gives
// this file.
#include "winograd_kernel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define PFS_VECTOR_BYTES 64
#include "winograd_kernel_impl.h"

namespace pfs::cpu {

extern const WinogradKernels* const winograd_avx512 = winograd_kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const WinogradKernels* const winograd_avx512 = nullptr;

}  // namespace pfs::cpu

#endif
