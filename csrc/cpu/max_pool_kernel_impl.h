// The kernels of max_pool, compiled once per instruction set by max_pool_kernel_<isa>.cpp.
//
// A value replaces the maximum so far if it is larger or NaN, as in PyTorch: the first of equal
// maxima wins, and the last of several NaN. The backward pass gathers (rows) or stays within one
// plane (planes), so that no two threads add to one value, in the order of the output.
#pragma once

#include <limits>
#include <type_traits>

#include "max_pool_kernel.h"
#include "tile.h"

namespace pfs::cpu {
namespace {

// ---- bytes of a tile, in the lane order of its values ----

template <int kLanes>
struct Bytes;
#define PFS_BYTES(lanes)                                           \
  template <>                                                      \
  struct Bytes<lanes> {                                            \
    typedef uint8_t V __attribute__((vector_size(lanes)));         \
    typedef uint16_t Wide __attribute__((vector_size(2 * lanes))); \
  };
PFS_BYTES(2)
PFS_BYTES(4)
PFS_BYTES(8)
PFS_BYTES(16)
PFS_BYTES(32)
#undef PFS_BYTES

// One tap in every lane.
template <class A>
PFS_INLINE typename Vec<A>::I taps(int64_t tap) {
  using I = typename Vec<A>::I;
  return I{} + static_cast<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>(tap);
}

template <class V>
PFS_INLINE V load_bytes(const uint8_t* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class T>
PFS_INLINE TileMask<Acc<T>> load_taps(const uint8_t* p) {
  using A = Acc<T>;
  using I = typename Vec<A>::I;
  if constexpr (sizeof(T) == sizeof(A)) {
    using B = typename Bytes<Vec<A>::kLanes>::V;
    return {__builtin_convertvector(load_bytes<B>(p), I),
            __builtin_convertvector(load_bytes<B>(p + Vec<A>::kLanes), I)};
  } else {  // even values in one vector, odd ones in the other
    using B = Bytes<kTile<T>>;
    using U = typename Vec<A>::U;
    const U pairs = (U) __builtin_convertvector(load_bytes<typename B::V>(p), typename B::Wide);
    return {(I)(pairs & 0xffffu), (I)(pairs >> 16)};
  }
}

template <class T>
PFS_INLINE void store_taps(uint8_t* p, TileMask<Acc<T>> taps) {
  using A = Acc<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    using B = typename Bytes<Vec<A>::kLanes>::V;
    const B a = __builtin_convertvector(taps.a, B), b = __builtin_convertvector(taps.b, B);
    std::memcpy(p, &a, sizeof(B));
    std::memcpy(p + sizeof(B), &b, sizeof(B));
  } else {
    using B = Bytes<kTile<T>>;
    const auto bytes =
        __builtin_convertvector((typename B::Wide)(taps.a | taps.b << 16), typename B::V);
    std::memcpy(p, &bytes, sizeof(bytes));
  }
}

// kFull: n is a whole tile, and so is what can be read.
template <bool kFull, class T>
PFS_INLINE TileMask<Acc<T>> load_taps_n(const uint8_t* p, int64_t n, int64_t readable) {
  if (kFull || readable >= kTile<T>) return load_taps<T>(p);
  uint8_t buffer[kTile<T>] = {};
  std::memcpy(buffer, p, n);
  return load_taps<T>(buffer);
}
template <bool kFull, class T>
PFS_INLINE void store_taps_n(uint8_t* p, TileMask<Acc<T>> taps, int64_t n) {
  if (kFull) return store_taps<T>(p, taps);
  uint8_t buffer[kTile<T>];
  store_taps<T>(buffer, taps);
  std::memcpy(p, buffer, n);
}

// ---- windows ----

// The part of a window that lies in the image, along one dimension.
struct Window {
  int64_t begin, end;  // positions
  int64_t tap;         // of begin

  PFS_INLINE Window(int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
    const int64_t corner = out * stride - pad;
    begin = corner > 0 ? corner : 0;
    end = corner + kernel < size ? corner + kernel : size;
    tap = begin - corner;
  }
};

// The windows [first, last) that a position lies in, along one dimension, for ascending positions.
struct Windows {
  int64_t first = 0, last = 0;

  PFS_INLINE void move_to(int64_t at, int64_t stride, int64_t pad, int64_t kernel, int64_t count) {
    while (first < count && first * stride - pad + kernel <= at) ++first;
    while (last < count && last * stride - pad <= at) ++last;
  }
};

// Calls body(c) for whole tiles of channels from c on, which cover all channels. The last of
// several tiles is a whole one too: it does some channels of the one before again.
template <class T, class Body>
PFS_INLINE void for_each_tile(int64_t channels, Body&& body) {
  for (int64_t c = 0; c < channels; c += kTile<T>)
    body(c + kTile<T> <= channels ? c : channels - kTile<T>);
}

// ---- rows ----

template <bool kFull, class T>
PFS_INLINE void pool_tile(const PoolShape& s, const T* x, const T* x_end, T* y, uint8_t* offsets,
                          const Window& down, const Window& across, int64_t n) {
  using A = Acc<T>;
  using V = typename Vec<A>::V;
  using I = typename Vec<A>::I;
  Tile<A> best = splat_tile<A>(-std::numeric_limits<A>::infinity());
  const I corner = taps<A>(down.tap * s.kernel_x + across.tap);
  TileMask<A> at{corner, corner};
  for (int64_t i = down.begin; i < down.end; ++i) {
    const int64_t row_tap = (down.tap + i - down.begin) * s.kernel_x + across.tap;
    const T* from = x + (i * s.width + across.begin) * s.channels;
    for (int64_t j = across.begin; j < across.end; ++j, from += s.channels) {
      const Tile<A> value = load_n<kFull>(from, n, x_end - from);
      const I tap = taps<A>(row_tap + j - across.begin);
      const I a = (value.a > best.a) | (value.a != value.a);
      const I b = (value.b > best.b) | (value.b != value.b);
      best = {(V)(a ? (I)value.a : (I)best.a), (V)(b ? (I)value.b : (I)best.b)};
      at = {a ? tap : at.a, b ? tap : at.b};
    }
  }
  store_n<kFull>(y, best, n);
  store_taps_n<kFull, T>(offsets, at, n);
}

template <class T>
void forward_rows(const PoolShape& s, const void* x_data, void* y_data, uint8_t* offsets,
                  int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(x_data);
  const T* x_end = x + s.batch * s.height * s.width * s.channels;
  int64_t to = first * s.out_width * s.channels;
  for (int64_t row = first; row < last; ++row) {
    const T* image = x + row / s.out_height * s.height * s.width * s.channels;
    const Window down(row % s.out_height, s.stride_y, s.pad_y, s.kernel_y, s.height);
    for (int64_t column = 0; column < s.out_width; ++column, to += s.channels) {
      const Window across(column, s.stride_x, s.pad_x, s.kernel_x, s.width);
      T* y = static_cast<T*>(y_data) + to;
      if (s.channels < kTile<T>) {
        pool_tile<false>(s, image, x_end, y, offsets + to, down, across, s.channels);
      } else {
        for_each_tile<T>(s.channels, [&](int64_t c) {
          pool_tile<true>(s, image + c, x_end, y + c, offsets + to + c, down, across, kTile<T>);
        });
      }
    }
  }
}

// grad_y and offsets of one image from one channel on; `readable` values of them are in the tensor.
template <class T>
struct PooledImage {
  const T* grad;
  const uint8_t* offsets;
  int64_t readable;
};

template <bool kFull, class T>
PFS_INLINE void gather_tile(const PoolShape& s, const PooledImage<T>& pooled, T* grad_x,
                            const Windows& down, const Windows& across, int64_t i, int64_t j,
                            int64_t n) {
  using A = Acc<T>;
  using I = typename Vec<A>::I;
  Tile<A> sum = splat_tile<A>(A(0));
  for (int64_t row = down.first; row < down.last; ++row) {
    const int64_t row_tap = (i + s.pad_y - row * s.stride_y) * s.kernel_x + j + s.pad_x;
    for (int64_t column = across.first; column < across.last; ++column) {
      const int64_t from = (row * s.out_width + column) * s.channels;
      const I tap = taps<A>(row_tap - column * s.stride_x);
      const int64_t readable = pooled.readable - from;
      const TileMask<A> at = load_taps_n<kFull, T>(pooled.offsets + from, n, readable);
      const Tile<A> grad = load_n<kFull>(pooled.grad + from, n, readable);
      sum = sum + keep<A>(grad, {at.a == tap, at.b == tap});
    }
  }
  store_n<kFull>(grad_x, sum, n);
}

template <class T>
void backward_rows(const PoolShape& s, const void* grad_y, const uint8_t* offsets,
                   void* grad_x_data, int64_t first, int64_t last) {
  const int64_t image_values = s.out_height * s.out_width * s.channels;
  T* grad_x = static_cast<T*>(grad_x_data) + first * s.width * s.channels;
  for (int64_t row = first; row < last; ++row) {
    const int64_t image = row / s.height, i = row % s.height;
    const PooledImage<T> pooled{static_cast<const T*>(grad_y) + image * image_values,
                                offsets + image * image_values, (s.batch - image) * image_values};
    Windows down, across;
    down.move_to(i, s.stride_y, s.pad_y, s.kernel_y, s.out_height);
    for (int64_t j = 0; j < s.width; ++j, grad_x += s.channels) {
      across.move_to(j, s.stride_x, s.pad_x, s.kernel_x, s.out_width);
      if (s.channels < kTile<T>) {
        gather_tile<false>(s, pooled, grad_x, down, across, i, j, s.channels);
      } else {
        for_each_tile<T>(s.channels, [&](int64_t c) {
          const PooledImage<T> part{pooled.grad + c, pooled.offsets + c, pooled.readable - c};
          gather_tile<true>(s, part, grad_x + c, down, across, i, j, kTile<T>);
        });
      }
    }
  }
}

// ---- planes ----

template <class T>
PFS_INLINE void pool_window(const PoolShape& s, const T* plane, const Window& down,
                            const Window& across, T* y, uint8_t* offset) {
  Acc<T> best = -std::numeric_limits<Acc<T>>::infinity();
  const T* source = plane + down.begin * s.width + across.begin;
  int64_t at = down.tap * s.kernel_x + across.tap;
  T chosen = *source;  // -infinity, where no value is larger
  for (int64_t i = down.begin; i < down.end; ++i) {
    const int64_t row_tap = (down.tap + i - down.begin) * s.kernel_x + across.tap;
    for (int64_t j = across.begin; j < across.end; ++j) {
      const T raw = plane[i * s.width + j];
      const Acc<T> value = to_acc(raw);
      const bool better = value > best || value != value;
      best = better ? value : best;
      chosen = better ? raw : chosen;
      at = better ? row_tap + j - across.begin : at;
    }
  }
  *y = chosen;
  *offset = static_cast<uint8_t>(at);
}

template <class T>
void forward_planes(const PoolShape& s, const void* x, void* y, uint8_t* offsets, int64_t first,
                    int64_t last) {
  int64_t to = first * s.out_height * s.out_width;
  for (int64_t p = first; p < last; ++p) {
    const T* plane = static_cast<const T*>(x) + p * s.height * s.width;
    for (int64_t row = 0; row < s.out_height; ++row) {
      const Window down(row, s.stride_y, s.pad_y, s.kernel_y, s.height);
      for (int64_t column = 0; column < s.out_width; ++column, ++to) {
        const Window across(column, s.stride_x, s.pad_x, s.kernel_x, s.width);
        pool_window(s, plane, down, across, static_cast<T*>(y) + to, offsets + to);
      }
    }
  }
}

PFS_INLINE void round_plane(const float* sums, BFloat16* out, int64_t count) {
  int64_t i = 0;
  for (; i + kTile<BFloat16> <= count; i += kTile<BFloat16>) {
    float pairs[kTile<BFloat16>];
    for (int64_t k = 0; k < kTile<BFloat16>; ++k) pairs[lane_of<BFloat16>(k)] = sums[i + k];
    store(out + i, load_lanes<float>(pairs));
  }
  float pairs[kTile<BFloat16>] = {};
  for (int64_t k = 0; k < count - i; ++k) pairs[lane_of<BFloat16>(k)] = sums[i + k];
  store_n<false>(out + i, load_lanes<float>(pairs), count - i);
}

template <class T>
void backward_planes(const PoolShape& s, const void* grad_y_data, const uint8_t* offsets,
                     void* grad_x, float* scratch, int64_t first, int64_t last) {
  using A = Acc<T>;
  const T* grad_y = static_cast<const T*>(grad_y_data);
  const int64_t size = s.height * s.width;
  const int64_t taps = s.kernel_y * s.kernel_x;
  int64_t tap_row[256], tap_column[256];
  for (int64_t t = 0; t < taps; ++t) {
    tap_row[t] = t / s.kernel_x;
    tap_column[t] = t % s.kernel_x;
  }
  int64_t from = first * s.out_height * s.out_width;
  for (int64_t p = first; p < last; ++p) {
    T* out = static_cast<T*>(grad_x) + p * size;
    A* sums;
    if constexpr (sizeof(T) == sizeof(A)) {
      sums = out;
    } else {
      sums = scratch;
    }
    std::memset(sums, 0, size * sizeof(A));
    for (int64_t row = 0; row < s.out_height; ++row) {
      for (int64_t column = 0; column < s.out_width; ++column, ++from) {
        const int64_t tap = offsets[from];
        if (tap >= taps) continue;  // not an offset of the forward pass
        const int64_t i = row * s.stride_y - s.pad_y + tap_row[tap];
        const int64_t j = column * s.stride_x - s.pad_x + tap_column[tap];
        if (i < 0 || i >= s.height || j < 0 || j >= s.width) continue;  // neither is this
        sums[i * s.width + j] += to_acc(grad_y[from]);
      }
    }
    if constexpr (sizeof(T) != sizeof(A)) round_plane(sums, out, size);
  }
}

template <class T>
constexpr MaxPoolDtypeKernels max_pool_kernels_of() {
  return {forward_rows<T>, forward_planes<T>, backward_rows<T>, backward_planes<T>};
}

constexpr MaxPoolKernels max_pool_kernels = {
    {max_pool_kernels_of<float>(), max_pool_kernels_of<double>(), max_pool_kernels_of<BFloat16>()}};

}  // namespace
}  // namespace pfs::cpu
