// The kernels of winograd_conv, compiled once per instruction set by winograd_kernel_<isa>.cpp.
#pragma once

#include <utility>

#include "winograd_gemm.h"
#include "winograd_kernel.h"

namespace pfs::cpu {
namespace {

constexpr int64_t kPanel = 2 * kLanes;

PFS_INLINE Floats load_some(const float* p, int64_t count) {
  Floats v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

PFS_INLINE void store_some(float* p, Floats v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

struct TilePlace {
  int64_t image, y, x;  // of the first output

  PFS_INLINE TilePlace(const WinogradShape& s, int64_t tile, int64_t size)
      : image(tile / (s.tiles_y * s.tiles_x)),
        y(tile / s.tiles_x % s.tiles_y * size),
        x(tile % s.tiles_x * size) {}
};

// ---- weights ----

// Lane i of the result is value order[i] of the two vectors, one after the other.
template <int... order>
PFS_INLINE Floats pick(Floats first, Floats second) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(first, second, order...);
#else
  return __builtin_shuffle(first, second, Vec<float>::I{order...});
#endif
}

// Exchanges the blocks of step x step values off the diagonal of every 2 step x 2 step square.
template <int step, int... lane>
PFS_INLINE void exchange(Floats* v, std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & step) != 0) continue;
    const Floats first = v[i], second = v[i + step];
    v[i] = pick<((lane & step) != 0 ? int{kLanes} + lane - step : lane)...>(first, second);
    v[i + step] = pick<((lane & step) != 0 ? int{kLanes} + lane : lane + step)...>(first, second);
  }
}

// Rows of a square of values become its columns.
template <int step = 1>
PFS_INLINE void transpose(Floats* v) {
  exchange<step>(v, std::make_integer_sequence<int, kLanes>{});
  if constexpr (2 * step < kLanes) transpose<2 * step>(v);
}

template <int kOutputs>
PFS_INLINE void transform_taps(const Floats (*taps)[kLanes], int64_t k, float* out,
                               int64_t frequency) {
  constexpr int kInputs = kOutputs + 2;
  Floats half[3][kInputs];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Floats column[3] = {taps[j][k], taps[3 + j][k], taps[6 + j][k]};
    Points<kOutputs>::weight(column, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kInputs; ++i) {
    const Floats row[3] = {half[0][i], half[1][i], half[2][i]};
    Floats values[kInputs];
    Points<kOutputs>::weight(row, values);
#pragma GCC unroll 6
    for (int j = 0; j < kInputs; ++j) store_floats(out + (i * kInputs + j) * frequency, values[j]);
  }
}

template <int kOutputs>
void transform_weights(const WinogradShape& s, const float* weight, int64_t first,
                       const PackedWeights& packed) {
  const int64_t depth = s.in_channels;
  Floats taps[9][kLanes];  // [tap][k], lanes: output channels
  for (int64_t n = 0; n < packed.width; n += kLanes) {
    const int64_t panel = n / kPanel * kPanel;
    const int64_t panel_width = packed.width - panel < kPanel ? packed.width - panel : kPanel;
    float* out = packed.data + panel * depth + (n - panel);
    const int64_t channel = first + n;
    const int64_t present = s.out_channels - channel;
    for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {
      const int64_t count = depth - k0 < kLanes ? depth - k0 : kLanes;
      for (int64_t tap = 0; tap < 9; ++tap) {
        if (s.reversed) {
          for (int64_t k = 0; k < count; ++k) {
            const float* from = weight + ((k0 + k) * 9 + tap) * s.out_channels + channel;
            taps[tap][k] = present >= kLanes ? load_floats(from) : load_some(from, present);
          }
        } else {
          for (int64_t i = 0; i < kLanes; ++i) {
            const float* from = weight + ((channel + i) * 9 + tap) * depth + k0;
            taps[tap][i] = i >= present        ? Floats{}
                           : count == kLanes   ? load_floats(from)
                                               : load_some(from, count);
          }
          transpose(taps[tap]);
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        transform_taps<kOutputs>(taps, k, out + (k0 + k) * panel_width, packed.frequency);
      }
    }
  }
}

// ---- images ----

template <int kOutputs>
void transform_input(const WinogradShape& s, const float* x, const float* zeros, int64_t first,
                     int64_t last, const Spectrum& input) {
  constexpr int kInputs = kOutputs + 2;
  const int64_t channels = s.in_channels;
  const float* end = x + s.batch * s.height * s.width * channels;
  for (int64_t tile = first; tile < last; ++tile) {
    const TilePlace place(s, tile, kOutputs);
    const int64_t x0 = place.x - s.pad_x;
    // Rows and columns outside of the image are zeros.
    const float* rows[kInputs];
    int64_t steps[kInputs];
    const float* furthest = x;
    for (int i = 0; i < kInputs; ++i) {
      const int64_t row = place.y - s.pad_y + (s.reversed ? kInputs - 1 - i : i);
      const bool inside = row >= 0 && row < s.height;
      rows[i] = inside ? x + (place.image * s.height + row) * s.width * channels : zeros;
      steps[i] = inside ? channels : 0;
      if (inside && rows[i] > furthest) furthest = rows[i];
    }
    // What a whole vector reads beyond a pixel is not used, but must be memory of the image.
    const bool may_read_on = end - furthest >= s.width * channels + kLanes;
    float* out = input.data + (tile - first) * input.row;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = channels - c;
      const bool whole = count >= kLanes || may_read_on;
      Floats half[kInputs][kInputs];
      for (int j = 0; j < kInputs; ++j) {
        const int64_t column = x0 + (s.reversed ? kInputs - 1 - j : j);
        if (column < 0 || column >= s.width) {
#pragma GCC unroll 6
          for (int i = 0; i < kInputs; ++i) half[i][j] = Floats{};
          continue;
        }
        Floats values[kInputs], transformed[kInputs];
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) {
          const float* from = rows[i] + column * steps[i] + c;
          values[i] = whole ? load_floats(from) : load_some(from, count);
        }
        Points<kOutputs>::input(values, transformed);
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) half[i][j] = transformed[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < kInputs; ++i) {
        Floats transformed[kInputs];
        Points<kOutputs>::input(half[i], transformed);
#pragma GCC unroll 6
        for (int j = 0; j < kInputs; ++j) {
          store_floats(out + (i * kInputs + j) * input.frequency + c, transformed[j]);
        }
      }
    }
  }
}

template <int kOutputs>
void multiply(const Spectrum& input, const PackedWeights& packed, const Spectrum& product,
              int64_t rows, int64_t depth) {
  constexpr int kFrequencies = (kOutputs + 2) * (kOutputs + 2);
  for (int f = 0; f < kFrequencies; ++f) {
    const float* a = input.data + f * input.frequency;
    const float* b = packed.data + f * packed.frequency;
    float* c = product.data + f * product.frequency;
    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const int64_t span = depth - k < kDepth ? depth - k : kDepth;
      for (int64_t n = 0; n < packed.width; n += kPanel) {
        const bool pair = packed.width - n >= kPanel;
        const float* panel = b + n * depth + k * (pair ? kPanel : kLanes);
        if (pair) {
          multiply_panel<2>(a + k, input.row, panel, c + n, product.row, rows, span, k > 0);
        } else {
          multiply_panel<1>(a + k, input.row, panel, c + n, product.row, rows, span, k > 0);
        }
      }
    }
  }
}

template <int kOutputs>
void transform_output(const WinogradShape& s, const Spectrum& product, int64_t first, int64_t last,
                      int64_t channel, int64_t width, const float* bias, float* y) {
  constexpr int kInputs = kOutputs + 2;
  for (int64_t tile = first; tile < last; ++tile) {
    const TilePlace place(s, tile, kOutputs);
    const float* in = product.data + (tile - first) * product.row;
    float* image = y + place.image * s.out_height * s.out_width * s.out_channels;
    for (int64_t n = 0; n < width && channel + n < s.out_channels; n += kLanes) {
      const int64_t count = s.out_channels - channel - n;
      Floats shift = {};
      if (bias != nullptr) {
        const float* from = bias + channel + n;
        shift = count >= kLanes ? load_floats(from) : load_some(from, count);
      }
      Floats half[kOutputs][kInputs];
#pragma GCC unroll 6
      for (int j = 0; j < kInputs; ++j) {
        Floats values[kInputs], transformed[kOutputs];
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) {
          values[i] = load_floats(in + (i * kInputs + j) * product.frequency + n);
        }
        Points<kOutputs>::output(values, transformed);
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; ++i) half[i][j] = transformed[i];
      }
      for (int i = 0; i < kOutputs; ++i) {
        const int64_t row = place.y + (s.reversed ? kOutputs - 1 - i : i);
        if (row >= s.out_height) continue;
        Floats transformed[kOutputs];
        Points<kOutputs>::output(half[i], transformed);
        float* out = image + (row * s.out_width + place.x) * s.out_channels + channel + n;
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) {
          const int64_t column = s.reversed ? kOutputs - 1 - j : j;
          if (place.x + column >= s.out_width) continue;
          float* to = out + column * s.out_channels;
          if (count >= kLanes) {
            store_floats(to, transformed[j] + shift);
          } else {
            store_some(to, transformed[j] + shift, count);
          }
        }
      }
    }
  }
}

template <int kOutputs>
constexpr WinogradKernels winograd_of() {
  return {kOutputs,
          kLanes,
          transform_weights<kOutputs>,
          transform_input<kOutputs>,
          multiply<kOutputs>,
          transform_output<kOutputs>};
}

constexpr WinogradKernels winograd_kernels[2] = {winograd_of<2>(), winograd_of<4>()};

}  // namespace
}  // namespace pfs::cpu
