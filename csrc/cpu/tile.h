// Vector arithmetic on tiles of values, written once for every instruction set with the compiler's
// vector extensions.
//
// The including file sets PFS_VECTOR_BYTES (16, 32 or 64). Everything here is in an anonymous
// namespace: a function compiled for AVX-512 must never be the copy that the linker keeps for
// another file.
#pragma once

#ifndef PFS_VECTOR_BYTES
#error "define PFS_VECTOR_BYTES before including tile.h"
#endif

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PFS_INLINE inline __attribute__((always_inline))

namespace pfs::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

template <class A>
struct Vec;

template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(PFS_VECTOR_BYTES), aligned(1), may_alias));
  typedef uint32_t UnalignedBits
      __attribute__((vector_size(PFS_VECTOR_BYTES), aligned(1), may_alias));
  static constexpr int kLanes = PFS_VECTOR_BYTES / 4;
};

template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(PFS_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(PFS_VECTOR_BYTES), aligned(1), may_alias));
  typedef uint64_t UnalignedBits
      __attribute__((vector_size(PFS_VECTOR_BYTES), aligned(1), may_alias));
  static constexpr int kLanes = PFS_VECTOR_BYTES / 8;
};

template <class T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<BFloat16> {
  using type = float;
};
template <class T>
using Acc = typename AccOf<T>::type;

// Two vectors. float and double: the halves follow each other. bfloat16: `a` holds the even values
// and `b` the odd ones, because widening a pair then costs a shift and a mask, and narrowing it
// needs no shuffle.
template <class A>
struct Tile {
  typename Vec<A>::V a, b;
};
template <class A>
struct TileMask {
  typename Vec<A>::I a, b;
};

template <class T>
constexpr int kTile = 2 * Vec<Acc<T>>::kLanes;

// Where value p of a tile sits in lane order.
template <class T>
PFS_INLINE int64_t lane_of(int64_t p) {
  return p;
}
template <>
PFS_INLINE int64_t lane_of<BFloat16>(int64_t p) {
  return (p & 1) * Vec<float>::kLanes + (p >> 1);
}

template <class A>
PFS_INLINE typename Vec<A>::V splat(A value) {
  return value - typename Vec<A>::V{};
}

template <class A>
PFS_INLINE Tile<A> splat_tile(A value) {
  return {splat<A>(value), splat<A>(value)};
}

template <class A>
PFS_INLINE Tile<A> operator+(Tile<A> x, Tile<A> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class A>
PFS_INLINE Tile<A> operator-(Tile<A> x, Tile<A> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class A>
PFS_INLINE Tile<A> operator*(Tile<A> x, Tile<A> y) {
  return {x.a * y.a, x.b * y.b};
}
// x * y + z, in one expression so that the compiler contracts it to one instruction.
template <class A>
PFS_INLINE Tile<A> muladd(Tile<A> x, Tile<A> y, Tile<A> z) {
  return {x.a * y.a + z.a, x.b * y.b + z.b};
}
// Keeps the lanes whose mask is set; the others become +0.
template <class A>
PFS_INLINE Tile<A> keep(Tile<A> x, TileMask<A> mask) {
  using V = typename Vec<A>::V;
  using I = typename Vec<A>::I;
  return {(V)((I)x.a & mask.a), (V)((I)x.b & mask.b)};
}

// ---- memory ----

// A tile of parameters or accumulators, already in lane order.
template <class A>
PFS_INLINE Tile<A> load_lanes(const A* p) {
  using U = typename Vec<A>::Unaligned;
  return {*reinterpret_cast<const U*>(p), *reinterpret_cast<const U*>(p + Vec<A>::kLanes)};
}
template <class A>
PFS_INLINE void store_lanes(A* p, Tile<A> x) {
  using U = typename Vec<A>::Unaligned;
  *reinterpret_cast<U*>(p) = x.a;
  *reinterpret_cast<U*>(p + Vec<A>::kLanes) = x.b;
}

template <class T>
PFS_INLINE Tile<T> load(const T* p) {
  return load_lanes<T>(p);
}
PFS_INLINE Tile<float> load(const BFloat16* p) {
  using V = Vec<float>::V;
  const Vec<float>::U pairs = *reinterpret_cast<const Vec<float>::UnalignedBits*>(p);
  return {(V)(pairs << 16), (V)(pairs & 0xffff0000u)};
}

template <class T>
PFS_INLINE T to_acc(T value) {
  return value;
}
PFS_INLINE float to_acc(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

template <class T>
PFS_INLINE void store(T* p, Tile<T> x) {
  store_lanes<T>(p, x);
}
// Round to nearest even in the upper half of the bits; a NaN would round to infinity.
PFS_INLINE Vec<float>::U bfloat16_in_upper_half(Vec<float>::V x) {
  using U = Vec<float>::U;
  const U bits = (U)x;
  const U rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);
  return x == x ? rounded : U{} + 0x7fc00000u;
}
PFS_INLINE void store(BFloat16* p, Tile<float> x) {
  *reinterpret_cast<Vec<float>::UnalignedBits*>(p) =
      (bfloat16_in_upper_half(x.a) >> 16) | (bfloat16_in_upper_half(x.b) & 0xffff0000u);
}

// The first n values of a tile, of which `readable` lie within the tensor; what the other lanes
// hold is not defined.
template <bool kFull, class T>
PFS_INLINE Tile<Acc<T>> load_n(const T* p, int64_t n, int64_t readable) {
  if (kFull || readable >= kTile<T>) return load(p);
  T buffer[kTile<T>];
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
// Stores the first n values of a tile and nothing else.
template <bool kFull, class T>
PFS_INLINE void store_n(T* p, Tile<Acc<T>> x, int64_t n) {
  if (kFull) return store(p, x);
  T buffer[kTile<T>];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// ---- bits: bit p of a tile is its value p in memory order ----

template <class A>
PFS_INLINE uint32_t sign_bits(typename Vec<A>::I mask) {
#if PFS_VECTOR_BYTES == 64 && defined(__AVX512DQ__) && defined(__AVX512BW__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm512_movepi64_mask((__m512i)mask));
#elif PFS_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif PFS_VECTOR_BYTES == 16 && defined(__SSE2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane)
    bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

// As sign_bits, of 16-bit lanes.
PFS_INLINE uint32_t sign_bits_16(Vec<float>::I mask) {
#if PFS_VECTOR_BYTES == 64 && defined(__AVX512DQ__) && defined(__AVX512BW__)
  return _mm512_movepi16_mask((__m512i)mask);
#elif PFS_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i bytes =
      _mm256_packs_epi16((__m256i)mask, _mm256_setzero_si256());  // within 128-bit halves
  const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  return (bits & 0xffu) | (bits >> 8 & 0xff00u);
#elif PFS_VECTOR_BYTES == 16 && defined(__SSE2__)
  return static_cast<uint32_t>(
      _mm_movemask_epi8(_mm_packs_epi16((__m128i)mask, _mm_setzero_si128())));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) {
    bits |= static_cast<uint32_t>(mask[lane] & 1) << 2 * lane;
    bits |= static_cast<uint32_t>(mask[lane] >> 16 & 1) << (2 * lane + 1);
  }
  return bits;
#endif
}

template <class T>
PFS_INLINE uint32_t mask_to_bits(TileMask<Acc<T>> mask) {
  using A = Acc<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return sign_bits<A>(mask.a) | sign_bits<A>(mask.b) << Vec<A>::kLanes;
  } else {
    // Halfwords in memory order: even values from a, odd ones from b.
    using U = typename Vec<A>::U;
    return sign_bits_16((typename Vec<A>::I)(((U)mask.a >> 16) | ((U)mask.b & 0xffff0000u)));
  }
}

template <class T>
PFS_INLINE TileMask<Acc<T>> bits_to_mask(uint32_t bits) {
  using A = Acc<T>;
  using I = typename Vec<A>::I;
  constexpr int kLanes = Vec<A>::kLanes;
  constexpr bool kInterleaved = sizeof(T) != sizeof(A);
  I of_a{}, of_b{};
  for (int lane = 0; lane < kLanes; ++lane) {
    of_a[lane] = static_cast<int32_t>(1u << (kInterleaved ? 2 * lane : lane));
    of_b[lane] = static_cast<int32_t>(1u << (kInterleaved ? 2 * lane + 1 : lane + kLanes));
  }
  const I all = I{} + static_cast<int32_t>(bits);
  return {(all & of_a) != 0, (all & of_b) != 0};
}

PFS_INLINE uint32_t low_bits(int64_t n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); }

// Bits [at, at + n) of a mask, n <= 32, reading no byte beyond them.
template <bool kFull, class T>
PFS_INLINE uint32_t read_bits(const uint8_t* bytes, int64_t at, int64_t n) {
  uint64_t word = 0;
  const uint8_t* first = bytes + at / 8;
  const int shift = static_cast<int>(at % 8);
  if (kFull && kTile<T> % 8 == 0) {
    std::memcpy(&word, first, kTile<T> / 8);
    if (shift == 0) return static_cast<uint32_t>(word);
    word |= static_cast<uint64_t>(first[kTile<T> / 8]) << kTile<T>;
  } else {
    for (int64_t i = 0; 8 * i < shift + n; ++i) word |= static_cast<uint64_t>(first[i]) << 8 * i;
  }
  return static_cast<uint32_t>(word >> shift) & low_bits(n);
}

// Writes bits [at, at + n) of a mask; at is a multiple of the tile, and a byte's lower bits are
// written first.
template <bool kFull, class T>
PFS_INLINE void write_bits(uint8_t* bytes, int64_t at, uint32_t bits, int64_t n) {
  if (!kFull) bits &= low_bits(n);
  if constexpr (kTile<T> % 8 == 0) {
    std::memcpy(bytes + at / 8, &bits, kFull ? kTile<T> / 8 : (n + 7) / 8);
  } else {
    const uint32_t before = at % 8 == 0 ? 0u : bytes[at / 8];
    bytes[at / 8] = static_cast<uint8_t>(before | bits << (at % 8));
  }
}

// Appends bits to a mask, from a byte boundary on.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* bytes) : next_(bytes) {}
  PFS_INLINE void put(uint32_t bits, int64_t n) {
    pending_ |= static_cast<uint64_t>(bits & low_bits(n)) << num_pending_;
    num_pending_ += static_cast<int>(n);
    if (num_pending_ >= 32) {
      const uint32_t word = static_cast<uint32_t>(pending_);
      std::memcpy(next_, &word, 4);
      next_ += 4;
      pending_ >>= 32;
      num_pending_ -= 32;
    }
  }
  PFS_INLINE void finish() {
    for (; num_pending_ > 0; num_pending_ -= 8, pending_ >>= 8)
      *next_++ = static_cast<uint8_t>(pending_);
  }

 private:
  uint8_t* next_;
  uint64_t pending_ = 0;
  int num_pending_ = 0;
};

}  // namespace
}  // namespace pfs::cpu
