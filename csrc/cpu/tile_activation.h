// The activations and their slopes on vectors, and the exponential that SiLU needs.
#pragma once

#include "../activation.h"
#include "tile.h"

namespace pfs::cpu {
namespace {

// exp(x) for x <= 0, to about 1 ulp; below the smallest normal number it stays there. NaN stays
// NaN. n = round(x / ln 2) comes from the low bits of x / ln 2 + 1.5 * 2^(mantissa bits); exp(r),
// |r| <= ln 2 / 2, from a polynomial.
PFS_INLINE Vec<float>::V exp_nonpositive(Vec<float>::V x) {
  using V = Vec<float>::V;
  using I = Vec<float>::I;
  x = x < -87.0f ? splat(-87.0f) : x;
  const V magic = splat(12582912.0f);
  const V shifted = x * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I exponent = ((I)shifted - (I)magic + 127) << 23;
  return p * (V)exponent;
}
PFS_INLINE Vec<double>::V exp_nonpositive(Vec<double>::V x) {
  using V = Vec<double>::V;
  using I = Vec<double>::I;
  x = x < -708.0 ? splat(-708.0) : x;
  const V magic = splat(6755399441055744.0);
  const V shifted = x * 1.4426950408889634 + magic;
  const V n = shifted - magic;
  V r = x - n * 0.693145751953125;  // the upper half of ln 2: n * it is exact
  r = r - n * 1.42860682030941723212e-6;
  // Taylor series to r^13 / 13!: the first term left out is below 5e-18.
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const I exponent = ((I)shifted - (I)magic + 1023) << 52;
  return p * (V)exponent;
}

template <class V>
PFS_INLINE V sigmoid(V z) {
  const V e = exp_nonpositive(z < 0 ? z : -z);
  const V positive = 1 / (1 + e);
  return z < 0 ? e * positive : positive;
}

// The comparisons are written so that NaN stays NaN.
template <Act act, class V>
PFS_INLINE V activate(V z) {
  if constexpr (act == Act::kRelu) return z <= 0 ? V{} : z;
  if constexpr (act == Act::kRelu6) return z <= 0 ? V{} : (z >= 6 ? V{} + 6 : z);
  if constexpr (act == Act::kSilu) return z * sigmoid(z);
  if constexpr (act == Act::kHardswish) return z <= -3 ? V{} : (z >= 3 ? z : z * (z + 3) / 6);
  return z;
}

// Where the slope of ReLU or ReLU6 is 1.
template <Act act, class A>
PFS_INLINE TileMask<A> slope_mask(Tile<A> z) {
  if constexpr (act == Act::kRelu6) return {(z.a > 0) & (z.a < 6), (z.b > 0) & (z.b < 6)};
  return {z.a > 0, z.b > 0};
}

template <Act act, class V>
PFS_INLINE V slope(V z) {
  if constexpr (act == Act::kSilu) {
    const V s = sigmoid(z);
    return s * (1 + z * (1 - s));
  }
  if constexpr (act == Act::kHardswish) return z <= -3 ? V{} : (z >= 3 ? V{} + 1 : z / 3 + 0.5);
  return V{} + 1;
}

// grad * act'(z).
template <Act act, class A>
PFS_INLINE Tile<A> times_slope(Tile<A> grad, Tile<A> z) {
  if constexpr (act == Act::kIdentity) return grad;
  if constexpr (act == Act::kRelu || act == Act::kRelu6) return keep(grad, slope_mask<act>(z));
  return {grad.a * slope<act>(z.a), grad.b * slope<act>(z.b)};
}

}  // namespace
}  // namespace pfs::cpu
