// bn_gate_act for what the compiler may assume of every processor of the architecture: 128-bit
// vectors.
#define PFS_VECTOR_BYTES 16
#include "bn_gate_act_kernel_impl.h"

namespace pfs::cpu {

extern const Kernels* const kernels_baseline = &kernels;

}  // namespace pfs::cpu
