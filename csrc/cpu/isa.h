// Which instruction set the CPU kernels use in this process.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "../checks.h"
#include "bn_gate_act_kernel.h"
#include "gemm_kernel.h"
#include "max_pool_kernel.h"
#include "winograd_kernel.h"

namespace pfs::cpu {

struct Isa {
  const char* name;
  const Kernels* kernels;           // null: not compiled
  const WinogradKernels* winograd;  // likewise
  const MaxPoolKernels* max_pool;   // likewise
  const GemmKernels* gemm;          // likewise
  bool runs_here;
};

inline Isa find_isa(std::string_view name) {
#if defined(__x86_64__)
  // The compiler's check includes the operating system's support of the registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512") {
    return {"avx512", kernels_avx512, winograd_avx512, max_pool_avx512, gemm_avx512, has_avx512};
  }
  if (name == "avx2") {
    return {"avx2", kernels_avx2, winograd_avx2, max_pool_avx2, gemm_avx2, has_avx2};
  }
#endif
  if (name != "baseline") return {"", nullptr, nullptr, nullptr, nullptr, false};
  return {"baseline",        kernels_baseline, winograd_baseline,
          max_pool_baseline, gemm_baseline,    true};
}

inline Isa choose_isa() {
  const char* forced = std::getenv("PFS_FAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (const char* name : {"avx512", "avx2"}) {
      const Isa isa = find_isa(name);
      if (isa.kernels != nullptr && isa.runs_here) return isa;
    }
    return find_isa("baseline");
  }
  const std::string_view name = forced;
  TORCH_CHECK_VALUE(name == "avx512" || name == "avx2" || name == "baseline",
                    "pfs_fast.ops: PFS_FAST_CPU_ISA must be one of baseline, avx2, avx512, got \"",
                    forced, "\"; unset it to use the best that this processor has");
  const Isa isa = find_isa(name);
  TORCH_CHECK_VALUE(
      isa.kernels != nullptr,
      "pfs_fast.ops: PFS_FAST_CPU_ISA must name an instruction set of this build, got \"", forced,
      "\"; unset it");
  TORCH_CHECK_VALUE(
      isa.runs_here,
      "pfs_fast.ops: PFS_FAST_CPU_ISA must name an instruction set that this processor has, got \"",
      forced, "\"; unset it or choose a lower one");
  return isa;
}

// Chosen at the first call; a bad PFS_FAST_CPU_ISA is reported by every call.
inline const Isa& chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

// type: of images and weights, float or bfloat16.
inline const WinogradKernels& winograd_kernels(const char* op, int64_t tile, c10::ScalarType type) {
  checks::check_tile(op, tile);
  return chosen_isa().winograd[tile / 2 - 1 + (type == c10::kBFloat16 ? 2 : 0)];
}

}  // namespace pfs::cpu
