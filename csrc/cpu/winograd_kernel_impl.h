// The kernels of winograd_conv, compiled once per instruction set by winograd_kernel_<isa>.cpp.
#pragma once

#include <cstring>
#include <utility>

#include "winograd_kernel.h"
#include "winograd_points.h"

namespace pfs::cpu {
namespace {

// Half as many bytes as a vector of floats: as many values of bfloat16.
typedef uint16_t Halves __attribute__((vector_size(PFS_VECTOR_BYTES / 2)));

PFS_INLINE Floats widened(Halves v) {
  return (Floats)(__builtin_convertvector(v, Vec<float>::U) << 16);
}
PFS_INLINE Halves narrowed(Floats v) {
  return __builtin_convertvector(bfloat16_in_upper_half(v) >> 16, Halves);
}

PFS_INLINE Floats load_values(const float* p) { return load_floats(p); }
PFS_INLINE Floats load_values(const BFloat16* p) {
  Halves v;
  std::memcpy(&v, p, sizeof(v));
  return widened(v);
}
PFS_INLINE void store_values(float* p, Floats v) { store_floats(p, v); }
PFS_INLINE void store_values(BFloat16* p, Floats v) {
  const Halves halves = narrowed(v);
  std::memcpy(p, &halves, sizeof(halves));
}

// The first `count` lanes, fewer than all; the others are 0, and their memory is not touched.
PFS_INLINE Floats load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(count));
  return (Floats)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(all, lanes));
#else
  Floats v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
PFS_INLINE Floats load_some(const BFloat16* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return widened((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
#else
  Halves v = {};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(BFloat16));
  return widened(v);
#endif
}

PFS_INLINE void store_some(float* p, Floats v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(count));
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(all, lanes), (__m256)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}
PFS_INLINE void store_some(BFloat16* p, Floats v, int64_t count) {
  const Halves halves = narrowed(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), (__m256i)halves);
#else
  std::memcpy(p, &halves, static_cast<size_t>(count) * sizeof(BFloat16));
#endif
}

// Where a tile is; goes from one to the next without dividing.
template <int kOutputs>
struct TilePlace {
  int64_t image, y, x;  // of the first output

  PFS_INLINE TilePlace(const WinogradShape& s, int64_t tile)
      : image(tile / (s.tiles_y * s.tiles_x)),
        y(tile / s.tiles_x % s.tiles_y * kOutputs),
        x(tile % s.tiles_x * kOutputs),
        end_y_(s.tiles_y * kOutputs),
        end_x_(s.tiles_x * kOutputs) {}

  PFS_INLINE void next() {
    if ((x += kOutputs) < end_x_) return;
    x = 0;
    if ((y += kOutputs) < end_y_) return;
    y = 0;
    ++image;
  }

 private:
  int64_t end_y_, end_x_;
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

// Taps [k0, k0 + count) of the lanes output channels from `channel` on; those beyond the last are 0.
template <class T>
PFS_INLINE void load_taps(const WinogradShape& s, const T* weight, int64_t channel, int64_t k0,
                          int64_t count, Floats (*taps)[kLanes]) {
  const int64_t present = s.out_channels - channel;
  for (int64_t tap = 0; tap < 9; ++tap) {
    if (s.reversed) {
      for (int64_t k = 0; k < count; ++k) {
        const T* from = weight + ((k0 + k) * 9 + tap) * s.out_channels + channel;
        taps[tap][k] = present >= kLanes ? load_values(from) : load_some(from, present);
      }
    } else {
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* from = weight + ((channel + i) * 9 + tap) * s.in_channels + k0;
        taps[tap][i] = i >= present        ? Floats{}
                       : count >= kLanes   ? load_values(from)
                                           : load_some(from, count);
      }
      transpose(taps[tap]);
    }
  }
}

template <class T, int kOutputs>
void transform_weights(const WinogradShape& s, const void* weights, int64_t first,
                       const PackedWeights& packed) {
  const auto* weight = static_cast<const T*>(weights);
  const int64_t depth = s.in_channels;
  Floats taps[9][kLanes];  // [tap][k], lanes: output channels
  for (int64_t panel = 0, width; panel < packed.width; panel += width) {
    width = panel_width(packed.width - panel, kLanes);
    // All vectors of a panel for a few k, then the next k: they share lines of the cache.
    for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {
      const int64_t count = depth - k0 < kLanes ? depth - k0 : kLanes;
      for (int64_t n = 0; n < width; n += kLanes) {
        load_taps(s, weight, first + panel + n, k0, count, taps);
        float* out = packed.data + panel * depth + k0 * width + n;
        for (int64_t k = 0; k < count; ++k) {
          transform_taps<kOutputs>(taps, k, out + k * width, packed.frequency);
        }
      }
    }
  }
}

// ---- images ----

// Where the inputs of one tile lie.
template <class T, int kInputs>
struct Window {
  const T* rows[kInputs];  // null: a row of zeros
  int64_t columns[kInputs];    // offset of a pixel in its row; any pixel where there is none
  bool inside;                 // every column has a pixel
  Vec<float>::I masks[kInputs];  // where not inside: all bits set, or none for a column of zeros
};

template <class T, int kOutputs, int kInputs = kOutputs + 2>
PFS_INLINE void place_window(const WinogradShape& s, const T* x,
                             const TilePlace<kOutputs>& place, Window<T, kInputs>& window) {
  const int64_t channels = s.in_channels, line = s.width * channels;
  const int64_t top = place.y - s.pad_y, left = place.x - s.pad_x;
  const T* image = x + place.image * s.height * line;
#pragma GCC unroll 6
  for (int i = 0; i < kInputs; ++i) {
    const int64_t row = top + (s.reversed ? kInputs - 1 - i : i);
    window.rows[i] = row >= 0 && row < s.height ? image + row * line : nullptr;
  }
  window.inside = left >= 0 && left + kInputs <= s.width;
#pragma GCC unroll 6
  for (int i = 0; i < kInputs; ++i) {
    const int64_t column = left + (s.reversed ? kInputs - 1 - i : i);
    if (window.inside) {
      window.columns[i] = column * channels;
    } else {
      const bool there = column >= 0 && column < s.width;
      window.columns[i] = there ? column * channels : 0;
      window.masks[i] = Vec<float>::I{} - static_cast<int32_t>(there);
    }
  }
}

// One vector of channels of one tile; count: channels that are left.
template <int kOutputs, bool kWhole, bool kInside, class T>
PFS_INLINE void transform_window(const Window<T, kOutputs + 2>& window, int64_t c, int64_t count,
                                 float* out, int64_t frequency) {
  constexpr int kInputs = kOutputs + 2;
  Floats half[kInputs][kInputs];
#pragma GCC unroll 6
  for (int i = 0; i < kInputs; ++i) {
    if (window.rows[i] == nullptr) {
#pragma GCC unroll 6
      for (int j = 0; j < kInputs; ++j) half[i][j] = Floats{};
      continue;
    }
    const T* row = window.rows[i] + c;
    Floats values[kInputs];
#pragma GCC unroll 6
    for (int j = 0; j < kInputs; ++j) {
      const T* from = row + window.columns[j];
      values[j] = kWhole ? load_values(from) : load_some(from, count);
      if (!kInside) values[j] = (Floats)((Vec<float>::I)values[j] & window.masks[j]);
    }
    Points<kOutputs>::input(values, half[i]);
  }
  // Column by column: frequencies i * kInputs + j.
  const int64_t below = frequency * kInputs;
#pragma GCC unroll 6
  for (int j = 0; j < kInputs; ++j) {
    Floats values[kInputs], transformed[kInputs];
#pragma GCC unroll 6
    for (int i = 0; i < kInputs; ++i) values[i] = half[i][j];
    Points<kOutputs>::input(values, transformed);
    float* to = out;
#pragma GCC unroll 6
    for (int i = 0; i < kInputs; ++i) {
      store_floats(to, transformed[i]);
      to += below;
    }
    out += frequency;
  }
}

// Tiles whose pixels are fetched ahead of the one that is transformed. The processor's own
// prefetching does not follow so many rows at once: without, a map that has left the caches takes up
// to twice as long as one that is there.
constexpr int kTilesAhead = 4;

// Pixels of a tile which the one before it in its row does not read, from the first row on. An
// address, since it may lie beside the image: it is fetched, not read.
template <int kOutputs, class T>
PFS_INLINE uintptr_t new_pixels(const WinogradShape& s, const T* x,
                                const TilePlace<kOutputs>& place) {
  const int64_t line = place.image * s.height + place.y - s.pad_y;
  const int64_t pixel = line * s.width + place.x - s.pad_x + 2;
  return reinterpret_cast<uintptr_t>(x) +
         static_cast<uintptr_t>(pixel * s.in_channels) * sizeof(T);
}

// The part of them that falls to one vector of channels; line: bytes of a row of pixels.
template <int kOutputs, class T>
PFS_INLINE void fetch_pixels(uintptr_t pixels, int64_t channel, int64_t line) {
  constexpr int kLine = 64, kBytes = kOutputs * kLanes * static_cast<int>(sizeof(T));
  pixels += static_cast<uintptr_t>(channel) * kOutputs * sizeof(T);
#pragma GCC unroll 6
  for (int i = 0; i < kOutputs + 2; ++i, pixels += line) {
#pragma GCC unroll 4
    for (int at = 0; at < kBytes; at += kLine)
      __builtin_prefetch(reinterpret_cast<const void*>(pixels + at), /*rw=*/0, /*locality=*/2);
  }
}

template <int kOutputs, bool kInside, class T>
PFS_INLINE void transform_tile(const WinogradShape& s, const Window<T, kOutputs + 2>& window,
                               float* out, int64_t frequency, bool cached, uintptr_t ahead) {
  const int64_t channels = s.in_channels, line = s.width * channels * sizeof(T);
  if (channels < kLanes) {
    if (!cached) fetch_pixels<kOutputs, T>(ahead, 0, line);
    transform_window<kOutputs, false, kInside>(window, 0, channels, out, frequency);
    return;
  }
  for (int64_t next = 0; next < channels; next += kLanes) {
    if (!cached) fetch_pixels<kOutputs, T>(ahead, next, line);
    // What is less than a vector at the end is done by the last whole one: faster than part of one.
    const int64_t c = channels - next < kLanes ? channels - kLanes : next;
    transform_window<kOutputs, true, kInside>(window, c, kLanes, out + c, frequency);
  }
}

template <class T, int kOutputs>
void transform_input(const WinogradShape& s, const void* image, int64_t first, int64_t last,
                     const Spectrum& input, bool cached) {
  const auto* x = static_cast<const T*>(image);
  float* out = input.data;
  TilePlace<kOutputs> place(s, first), ahead = place;
  for (int i = 0; i < kTilesAhead; ++i) ahead.next();
  Window<T, kOutputs + 2> window;
  for (int64_t tile = first; tile < last; ++tile, place.next(), ahead.next(), out += input.row) {
    place_window(s, x, place, window);
    const uintptr_t pixels = new_pixels(s, x, ahead);
    if (window.inside) {
      transform_tile<kOutputs, true>(s, window, out, input.frequency, cached, pixels);
    } else {
      transform_tile<kOutputs, false>(s, window, out, input.frequency, cached, pixels);
    }
  }
}

template <int kOutputs>
void multiply(const Spectrum& input, const PackedWeights& packed, const Spectrum& product,
              int64_t rows, int64_t depth, const Ahead& first, const Ahead& second) {
  constexpr int kFrequencies = (kOutputs + 2) * (kOutputs + 2);
  const int64_t panels = (packed.width + 2 * kLanes - 1) / (2 * kLanes);
  const int64_t blocks =
      kFrequencies * ((depth + kDepth - 1) / kDepth) * panels * (rows / kMaxRows<2>);
  Fetch fetch_first(first.begin, first.end, blocks > 0 ? blocks : 1);
  Fetch fetch_second(second.begin, second.end, blocks > 0 ? blocks : 1);
  for (int f = 0; f < kFrequencies; ++f) {
    const float* a = input.data + f * input.frequency;
    const float* b = packed.data + f * packed.frequency;
    float* c = product.data + f * product.frequency;
    multiply_packed(fetch_first, fetch_second, a, input.row, b, c, product.row, rows, depth,
                    packed.width, /*add=*/false);
  }
}

// One vector of channels of one tile. y: its first output in memory; added: as far from y in bytes as
// the same value of what is added, where kAdds; rows, columns: outputs inside of the image, counted
// from there.
template <int kOutputs, bool kWhole, bool kInside, bool kAdds, class T>
PFS_INLINE void transform_products(const float* in, int64_t frequency, Floats shift, T* y,
                                   int64_t added, int64_t y_row, int64_t y_column, int64_t rows,
                                   int64_t columns, bool reversed, int64_t count) {
  constexpr int kInputs = kOutputs + 2;
  Floats half[kInputs][kOutputs];
#pragma GCC unroll 6
  for (int i = 0; i < kInputs; ++i) {
    Floats values[kInputs];
#pragma GCC unroll 6
    for (int j = 0; j < kInputs; ++j) {
      values[j] = load_floats(in);
      in += frequency;
    }
    Points<kOutputs>::output(values, half[i]);
  }
  if (reversed) {
    y += (kOutputs - 1) * (y_row + y_column);
    y_row = -y_row;
    y_column = -y_column;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kOutputs; ++j) {
    Floats values[kInputs], transformed[kOutputs];
#pragma GCC unroll 6
    for (int i = 0; i < kInputs; ++i) values[i] = half[i][j];
    Points<kOutputs>::output(values, transformed);
    const bool has_column = kInside || (reversed ? kOutputs - 1 - j : j) < columns;
    T* to = y;
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
      if (kInside || (has_column && (reversed ? kOutputs - 1 - i : i) < rows)) {
        Floats value = transformed[i] + shift;
        if (kAdds) {
          const auto* other = reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(to) + added);
          value += kWhole ? load_values(other) : load_some(other, count);
        }
        if (kWhole) {
          store_values(to, value);
        } else {
          store_some(to, value, count);
        }
      }
      to += y_row;
    }
    y += y_column;
  }
}

template <int kOutputs, bool kAdds, class T>
PFS_INLINE void transform_outputs(const WinogradShape& s, const Spectrum& product, int64_t first,
                                  int64_t last, int64_t channel, int64_t width, const float* bias,
                                  int64_t added, T* y) {
  const int64_t frequency = product.frequency;
  const int64_t y_column = s.out_channels, y_row = s.out_width * y_column;
  const int64_t present = s.out_channels - channel < width ? s.out_channels - channel : width;
  const bool reversed = s.reversed;
  const float* in = product.data;
  TilePlace<kOutputs> place(s, first);
  for (int64_t tile = first; tile < last; ++tile, place.next()) {
    T* out = y + (place.image * s.out_height + place.y) * y_row + place.x * y_column + channel;
    const int64_t rows = s.out_height - place.y, columns = s.out_width - place.x;
    const bool inside = rows >= kOutputs && columns >= kOutputs;
    for (int64_t next = 0; next < present; next += kLanes) {
      // As for the input: the last vector begins so early that it is whole.
      const int64_t n =
          present >= kLanes && present - next < kLanes ? present - kLanes : next;
      const int64_t count = present - n;
      Floats shift = {};
      if (bias != nullptr) {
        const float* from = bias + channel + n;
        shift = count >= kLanes ? load_floats(from) : load_some(from, count);
      }
      if (count < kLanes) {
        transform_products<kOutputs, false, false, kAdds>(in + n, frequency, shift, out + n, added,
                                                          y_row, y_column, rows, columns, reversed,
                                                          count);
      } else if (inside) {
        transform_products<kOutputs, true, true, kAdds>(in + n, frequency, shift, out + n, added,
                                                        y_row, y_column, rows, columns, reversed,
                                                        count);
      } else {
        transform_products<kOutputs, true, false, kAdds>(in + n, frequency, shift, out + n, added,
                                                         y_row, y_column, rows, columns, reversed,
                                                         count);
      }
    }
    in += product.row;
  }
}

template <class T, int kOutputs>
void transform_output(const WinogradShape& s, const Spectrum& product, int64_t first, int64_t last,
                      int64_t channel, int64_t width, const float* bias, const void* added,
                      void* out) {
  auto* y = static_cast<T*>(out);
  if (added == nullptr) {
    transform_outputs<kOutputs, false>(s, product, first, last, channel, width, bias, 0, y);
  } else {
    const intptr_t away = reinterpret_cast<intptr_t>(added) - reinterpret_cast<intptr_t>(y);
    transform_outputs<kOutputs, true>(s, product, first, last, channel, width, bias, away, y);
  }
}

template <class T, int kOutputs>
constexpr WinogradKernels winograd_of() {
  return {kOutputs,
          kLanes,
          sizeof(T),
          transform_weights<T, kOutputs>,
          transform_input<T, kOutputs>,
          multiply<kOutputs>,
          transform_output<T, kOutputs>};
}

constexpr WinogradKernels winograd_kernels[4] = {winograd_of<float, 2>(), winograd_of<float, 4>(),
                                                 winograd_of<BFloat16, 2>(),
                                                 winograd_of<BFloat16, 4>()};

}  // namespace
}  // namespace pfs::cpu
