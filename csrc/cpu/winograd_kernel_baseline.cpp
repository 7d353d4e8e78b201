// winograd_conv for what the compiler may assume of every processor of the architecture: 128-bit
// vectors.
#define PFS_VECTOR_BYTES 16
#include "winograd_kernel_impl.h"

namespace pfs::cpu {

extern const WinogradKernels* const winograd_baseline = winograd_kernels;

}  // namespace pfs::cpu
