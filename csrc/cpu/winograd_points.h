// The one-dimensional transforms of Winograd's minimal filtering F(m, 3): y = A [(G g) * (B d)], with
// m + 2 values d, 3 taps g and m outputs y.
//
// They evaluate polynomials at 0, infinity and pairs of points +-a, so that each pair shares its even
// and its odd part. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv
// 1509.09308; points of F(4, 3): 0, +-1/sqrt(2), +-sqrt(2), infinity, which round better than the
// usual 0, +-1, +-2, infinity.
#pragma once

#include "gemm.h"

namespace pfs::cpu {
namespace {

template <int kOutputs>
struct Points;

// 0, 1, -1, infinity
template <>
struct Points<2> {
  static PFS_INLINE void input(const Floats* d, Floats* t) {
    t[0] = d[0] - d[2];
    t[1] = d[2] + d[1];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static PFS_INLINE void weight(const Floats* g, Floats* u) {
    const Floats even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  static PFS_INLINE void output(const Floats* m, Floats* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

// 0, a, -a, b, -b, infinity with a^2 = 1/2, b^2 = 2, so that a b = 1
template <>
struct Points<4> {
  static constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;
  static constexpr float kA2 = 0.5f, kB2 = 2.0f, kSum = 2.5f;
  static constexpr float kA3 = kA2 * kA, kB3 = kB2 * kB;

  static PFS_INLINE void input(const Floats* d, Floats* t) {
    const Floats even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
    const Floats even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
    t[0] = (d[0] + d[4]) - kSum * d[2];
    t[1] = even_a + kA * odd_a;
    t[2] = even_a - kA * odd_a;
    t[3] = even_b + kB * odd_b;
    t[4] = even_b - kB * odd_b;
    t[5] = (d[1] + d[5]) - kSum * d[3];
  }
  // Divided by the product of the distances of each point to the others: 1, -3/2 and 6.
  static PFS_INLINE void weight(const Floats* g, Floats* u) {
    constexpr float kPerA = -2.0f / 3, kPerB = 1.0f / 6;
    const Floats even_a = kPerA * g[0] + (kPerA * kA2) * g[2], odd_a = (kPerA * kA) * g[1];
    const Floats even_b = kPerB * g[0] + (kPerB * kB2) * g[2], odd_b = (kPerB * kB) * g[1];
    u[0] = g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  static PFS_INLINE void output(const Floats* m, Floats* y) {
    const Floats sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const Floats sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = (m[0] + sum_a) + sum_b;
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = m[5] + kA3 * difference_a + kB3 * difference_b;
  }
};

}  // namespace
}  // namespace pfs::cpu
