// The raw-pointer kernels behind bn_gate_act on the CPU: one table of functions per instruction
// set.
//
// Plain C++ without ATen: the files that implement the tables are compiled for instruction sets
// that the processor may lack, so they must not emit any inline function that other files could be
// linked to.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace pfs::cpu {

enum class Dtype : int { kFloat = 0, kDouble = 1, kBFloat16 = 2 };
constexpr int kNumDtypes = 3;
constexpr int kNumActs = 5;

// Where backward finds act'(z).
enum class SlopeSource : int {
  kIdentity = 0,  // the first five recompute z from x, in the order of pfs::Act
  kRelu = 1,
  kRelu6 = 2,
  kSilu = 3,
  kHardswish = 4,
  kBitmask = 5,
  kSavedSilu = 6,
  kSavedHardswish = 7,
};
constexpr int kNumSlopeSources = 8;

// Value i of a tensor in memory order belongs to channel (i / inner) % channels.
//
// Row mode (period > 0): memory is a sequence of rows of `period` values, a multiple of `unit`,
// which is a multiple of channels * inner and of the tile of the kernels. Per-channel parameters
// are expanded to one value per position of a row, in the lane order of the kernels. Elementwise
// passes go by rows of `period`, reductions by rows of `unit`: the former want long loops, the
// latter few accumulators. It serves channels_last, and contiguous tensors with few values per
// plane. Plane mode (period = 0): `inner` consecutive values share a channel; per-channel
// parameters stay [channels].
struct Layout {
  int64_t numel;
  int64_t channels;
  int64_t inner;
  int64_t unit;
  int64_t period;
};

// Values [s0, s1) of the planes of samples [n0, n1) and channels [c0, c1).
struct PlaneRange {
  int64_t n0, n1, c0, c1, s0, s1;
};

// z = (x - mean) * scale + shift (+ residual); acc = double for double, else float.
struct ForwardArgs {
  const void* x;         // [numel]
  const void* residual;  // [numel] or null
  const void* mean;      // acc, expanded
  const void* scale;     // acc, expanded
  const void* shift;     // acc, expanded
  void* y;               // [numel]
  void* aux;             // bitmask or z, see AuxKind; else null
};

// grad_x = scale * g + (x - mean) * centred_factor + offset  if training, else  scale * g.
struct BackwardArgs {
  const void* grad_y;          // [numel]
  const void* x;               // [numel]
  const void* aux;             // bitmask or z; else null
  const void* mean;            // acc, expanded
  const void* scale;           // acc, expanded
  const void* shift;           // acc, expanded
  const void* centred_factor;  // acc, expanded; apply pass only
  const void* offset;          // acc, expanded; apply pass only
  void* grad_x;                // [numel] or null; apply pass only
  void* grad_residual;         // [numel] or null; apply pass only
  bool training;
};

struct DtypeKernels {
  // Values handled together; a period is a multiple of it and of 8.
  int64_t tile;
  // values [channels] -> acc, expanded [period] or [channels].
  void (*expand)(const Layout&, const double* values, void* out);

  // Mean and sum of squared deviations per channel over values [begin, end), or over a range of
  // planes. begin is a multiple of period. scratch: 6 * unit doubles. Outputs: [channels] (planes:
  // c0..c1 of it).
  void (*stats_rows)(const Layout&, const void* x, int64_t begin, int64_t end, double* mean,
                     double* m2, double* scratch);
  void (*stats_planes)(const Layout&, const void* x, const PlaneRange&, double* mean, double* m2);

  // Values [begin, end): begin is a multiple of period (row mode) or of 64 (plane mode).
  void (*forward[kNumActs][2])(const Layout&, const ForwardArgs&, int64_t begin,
                               int64_t end);  // [act][has residual]
  void (*backward[kNumSlopeSources])(const Layout&, const BackwardArgs&, int64_t begin,
                                     int64_t end);

  // Sums of g and of g * (x - mean) per channel. scratch: 4 * unit doubles.
  void (*reduce_rows[kNumSlopeSources])(const Layout&, const BackwardArgs&, int64_t begin,
                                        int64_t end, double* sum_g, double* sum_gx,
                                        double* scratch);
  void (*reduce_planes[kNumSlopeSources])(const Layout&, const BackwardArgs&, const PlaneRange&,
                                          double* sum_g, double* sum_gx);
};

struct Kernels {
  DtypeKernels of[kNumDtypes];
};

// Null where the file was compiled without its instruction set (another architecture).
extern const Kernels* const kernels_baseline;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_avx512;

}  // namespace pfs::cpu
