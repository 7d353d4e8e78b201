// The arithmetic of one value and the 16-byte packs that values travel in. Everything here runs on
// host and device alike, so that it can be tested without a GPU.
#ifndef PFS_CUDA_VECTOR_CUH_
#define PFS_CUDA_VECTOR_CUH_

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../activation.h"

namespace pfs::cuda {

template <typename T>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccType<T>::type;

// Values per access where shape and address allow more than one: 16 bytes. Doubles, which serve to
// check the other types, go one by one: their 8 bytes per thread are coalesced all the same, and a
// fifth of the kernels need not exist.
template <typename T>
inline constexpr int kPackSize = std::is_same_v<T, double> ? 1 : 16 / static_cast<int>(sizeof(T));

// V values that move with accesses of 16 bytes (fewer if the pack is smaller).
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T values[V];
};

template <int V, typename T>
C10_HOST_DEVICE inline Pack<T, V> load_pack(const T* __restrict__ source) {
  return *reinterpret_cast<const Pack<T, V>*>(source);
}

template <int V, typename T>
C10_HOST_DEVICE inline void store_pack(T* __restrict__ target, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// 1 / sqrt(var + eps). The forward and backward kernels must call this very function, or z is not
// recomputed bit for bit.
C10_HOST_DEVICE inline float inverse_std(float var, float eps) {
#ifdef __CUDA_ARCH__
  return ::rsqrtf(__fadd_rn(var, eps));
#else
  return 1.0f / std::sqrt(var + eps);
#endif
}

C10_HOST_DEVICE inline double inverse_std(double var, double eps) {
#ifdef __CUDA_ARCH__
  return ::rsqrt(__dadd_rn(var, eps));
#else
  return 1.0 / std::sqrt(var + eps);
#endif
}

C10_HOST_DEVICE inline float fused_multiply_add(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
C10_HOST_DEVICE inline double fused_multiply_add(double a, double b, double c) {
  return ::fma(a, b, c);
}
// a / b to 2 units in the last place; 0 for b beyond 2^126, where the quotients taken here vanish
// anyway.
C10_HOST_DEVICE inline float quick_divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
C10_HOST_DEVICE inline double quick_divide(double a, double b) { return a / b; }

C10_HOST_DEVICE inline float exponential(float v) { return ::expf(v); }
C10_HOST_DEVICE inline double exponential(double v) { return ::exp(v); }

// z without the residual, as a function of x: scale * (x - mean) + shift.
template <typename acc>
struct Affine {
  acc mean;
  acc scale;  // gate * weight * rstd
  acc shift;  // gate * bias

  // An explicit fma: left to the compiler, two kernels could round differently and disagree about
  // the sign of z.
  C10_HOST_DEVICE acc operator()(acc x) const { return fused_multiply_add(x - mean, scale, shift); }
};

// The per-channel arguments of the operator; a null pointer stands for gate 1, weight 1, bias 0.
template <typename acc>
struct ChannelParams {
  const acc* __restrict__ gate;
  const acc* __restrict__ weight;
  const acc* __restrict__ bias;

  C10_HOST_DEVICE acc gate_of(int64_t c) const { return gate != nullptr ? gate[c] : acc(1); }
  C10_HOST_DEVICE acc weight_of(int64_t c) const { return weight != nullptr ? weight[c] : acc(1); }
  C10_HOST_DEVICE acc bias_of(int64_t c) const { return bias != nullptr ? bias[c] : acc(0); }

  C10_HOST_DEVICE Affine<acc> affine(int64_t c, acc mean, acc rstd) const {
    const acc g = gate_of(c);
    return {mean, g * weight_of(c) * rstd, g * bias_of(c)};
  }
};

// Two families instead of five activations keep the number of kernels down: within a family the
// choice is a value.
enum class ActFamily : int {
  kClamp = 0,   // identity, relu, relu6: clamp to [lo, hi]
  kSmooth = 1,  // silu, hardswish
};

constexpr ActFamily act_family(Act act) {
  return act == Act::kSilu || act == Act::kHardswish ? ActFamily::kSmooth : ActFamily::kClamp;
}

template <typename acc>
struct ActParams {
  acc lo;
  acc hi;
  bool is_identity;
  bool is_hardswish;
};

template <typename acc>
inline ActParams<acc> act_params(Act act) {
  constexpr acc kInfinity = std::numeric_limits<acc>::infinity();
  return {act == Act::kRelu || act == Act::kRelu6 ? acc(0) : -kInfinity,
          act == Act::kRelu6 ? acc(6) : kInfinity, act == Act::kIdentity, act == Act::kHardswish};
}

template <ActFamily kFamily, typename acc>
C10_HOST_DEVICE inline acc activate(acc z, const ActParams<acc>& act) {
  if constexpr (kFamily == ActFamily::kClamp) {
    // Comparisons instead of fmin and fmax, which would turn NaN into a bound.
    return z < act.lo ? act.lo : (z > act.hi ? act.hi : z);
  } else {
    if (!act.is_hardswish) return quick_divide(z, acc(1) + exponential(-z));
    const acc t = z + acc(3);
    return z * (t < acc(0) ? acc(0) : (t > acc(6) ? acc(6) : t)) * acc(1.0 / 6.0);
  }
}

// act'(z) != 0 for the clamp family, whose derivative is 0 or 1; 0 at the bounds.
template <typename acc>
C10_HOST_DEVICE inline bool clamp_passes(acc z, const ActParams<acc>& act) {
  return (z > act.lo && z < act.hi) || act.is_identity;
}

// grad_y * act'(z)
template <ActFamily kFamily, typename acc>
C10_HOST_DEVICE inline acc activate_backward(acc grad_y, acc z, const ActParams<acc>& act) {
  if constexpr (kFamily == ActFamily::kClamp) {
    return clamp_passes(z, act) ? grad_y : acc(0);
  } else {
    if (act.is_hardswish) {
      return z <= acc(-3) ? acc(0)
                          : (z < acc(3) ? grad_y * (z * acc(1.0 / 3.0) + acc(0.5)) : grad_y);
    }
    const acc sigmoid = quick_divide(acc(1), acc(1) + exponential(-z));
    return grad_y * sigmoid * (acc(1) + z * (acc(1) - sigmoid));
  }
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_VECTOR_CUH_
