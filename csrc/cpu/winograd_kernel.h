// The raw-pointer kernels behind winograd_conv: one table of functions per instruction set.
//
// Plain C++ without ATen, for the reason that bn_gate_act_kernel.h gives.
#pragma once

#include <cstdint>

namespace pfs::cpu {

// One 3x3 convolution of stride 1 over dense [N, H, W, C] images, or the gradient for its input,
// which is such a convolution of grad_y with the taps reversed and the channels exchanged.
//
// Tile t holds the m x m outputs at row (t / tiles_x % tiles_y) * m and column (t % tiles_x) * m of
// image t / (tiles_x * tiles_y); it reads the (m + 2) x (m + 2) inputs around them.
struct WinogradShape {
  int64_t batch;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t in_channels, out_channels;
  int64_t pad_y, pad_x;  // zeros before the first row and column
  int64_t tiles_y, tiles_x;
  // The gradient: tiles are read and written from their last value to their first, which is what
  // reversed taps amount to, and weights as [K, 3, 3, N] in place of [N, 3, 3, K].
  bool reversed;

  int64_t num_tiles() const { return batch * tiles_y * tiles_x; }
};

// One matrix of transformed values for each of the (m + 2)^2 frequencies. Row r of frequency f
// starts at data + f * frequency + r * row.
struct Spectrum {
  float* data;
  int64_t row;
  int64_t frequency;
};

// Weights of the channels [0, width) of a chunk: frequency f, panel p (panel_width channels), value
// [k][channel of the panel].
struct PackedWeights {
  float* data;
  int64_t frequency;
  int64_t width;  // a multiple of lanes
};

// Memory that will be read or written soon, to be fetched while a multiplication leaves the memory
// idle. Empty by default.
struct Ahead {
  const void* begin = nullptr;
  const void* end = nullptr;
};

// C = input channels, K likewise where matrices are multiplied. Images and weights are float or
// bfloat16; what is between the transforms, and the bias, is float.
struct WinogradKernels {
  int64_t tile;      // m
  int64_t lanes;     // floats of a vector; row lengths are multiples of it
  int64_t itemsize;  // bytes of a value of images and weights

  // Weights of output channels [first, first + packed.width) -> packed; channels beyond the last
  // are 0.
  void (*transform_weights)(const WinogradShape&, const void* weight, int64_t first,
                            const PackedWeights& packed);
  // Tiles [first, last) -> rows [0, last - first), [C] each, C rounded up to lanes. cached: x is in
  // a cache near the core; else it is fetched some tiles ahead.
  void (*transform_input)(const WinogradShape&, const void* x, int64_t first, int64_t last,
                          const Spectrum& input, bool cached);
  // product [rows, width] = input [rows, K] times packed [K, width], for every frequency.
  void (*multiply)(const Spectrum& input, const PackedWeights& packed, const Spectrum& product,
                   int64_t rows, int64_t depth, const Ahead& first, const Ahead& second);
  // Rows [0, last - first) -> channels [channel, channel + width) of tiles [first, last), plus bias
  // [out_channels] and added, laid out as y, unless null. Channels beyond the last are left out.
  void (*transform_output)(const WinogradShape&, const Spectrum& product, int64_t first,
                           int64_t last, int64_t channel, int64_t width, const float* bias,
                           const void* added, void* y);
};

// Null where the file was compiled without its instruction set. m = 2 and 4 for float, then for
// bfloat16.
extern const WinogradKernels* const winograd_baseline;
extern const WinogradKernels* const winograd_avx2;
extern const WinogradKernels* const winograd_avx512;

}  // namespace pfs::cpu
