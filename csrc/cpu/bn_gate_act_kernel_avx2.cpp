// bn_gate_act for AVX2 and FMA; compiled with the flags that csrc/sources.txt gives this file.
#include "bn_gate_act_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)

#define PFS_VECTOR_BYTES 32
#include "bn_gate_act_kernel_impl.h"

namespace pfs::cpu {

extern const Kernels* const kernels_avx2 = &kernels;

}  // namespace pfs::cpu

#else

namespace pfs::cpu {

extern const Kernels* const kernels_avx2 = nullptr;

}  // namespace pfs::cpu

#endif
