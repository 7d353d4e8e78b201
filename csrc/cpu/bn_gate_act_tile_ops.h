// What each pass of bn_gate_act does to one tile.
//
// An operation has channel<kRows>(index), the parameters of a tile, and add() or apply() on the
// tile of values from i on; with kFull = false only the first n values count.
#pragma once

#include "bn_gate_act_kernel.h"
#include "tile_activation.h"

namespace pfs::cpu {
namespace {

// A parameter for one tile: from position `index` of a row, or of channel `index`.
template <bool kRows, class A>
PFS_INLINE Tile<A> parameter(const A* values, int64_t index) {
  if constexpr (kRows) return load_lanes(values + index);
  return splat_tile(values[index]);
}

template <class A>
struct Affine {
  Tile<A> mean, scale, shift;
};

// The one place where z is computed: backward must decide as forward did on which side of 0 it
// lies.
template <class A>
PFS_INLINE Tile<A> affine(Tile<A> x, const Affine<A>& c) {
  return muladd(x - c.mean, c.scale, c.shift);
}

template <class T>
class Stats {
 public:
  using A = Acc<T>;
  using Channel = Tile<A>;
  Stats(const void* x, const A* pivot, int64_t numel)
      : x_(static_cast<const T*>(x)), pivot_(pivot), numel_(numel) {}

  PFS_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x_ + i, 0, 3); }
  template <bool kRows>
  PFS_INLINE Channel channel(int64_t index) const {
    return parameter<kRows>(pivot_, index);
  }
  template <bool kFull>
  PFS_INLINE void add(int64_t i, int64_t n, const Channel& pivot, Tile<A>& sum,
                      Tile<A>& sum_squares) const {
    Tile<A> d = load_n<kFull>(x_ + i, n, numel_ - i) - pivot;
    if (!kFull) d = keep(d, bits_to_mask<T>(low_bits(n)));
    sum = sum + d;
    sum_squares = muladd(d, d, sum_squares);
  }

 private:
  const T* x_;
  const A* pivot_;
  const int64_t numel_;
};

template <class T, Act act, bool kResidual>
class Forward {
 public:
  using A = Acc<T>;
  using Channel = Affine<A>;
  static constexpr AuxKind kAux =
      !kResidual || act == Act::kIdentity
          ? AuxKind::kNone
          : (act == Act::kRelu || act == Act::kRelu6 ? AuxKind::kBitmask : AuxKind::kPreAct);

  Forward(const ForwardArgs& args, int64_t begin, int64_t numel)
      : args_(args),
        numel_(numel),
        bits_(kAux == AuxKind::kBitmask ? static_cast<uint8_t*>(args.aux) + begin / 8 : nullptr) {}

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    return {parameter<kRows>(static_cast<const A*>(args_.mean), i),
            parameter<kRows>(static_cast<const A*>(args_.scale), i),
            parameter<kRows>(static_cast<const A*>(args_.shift), i)};
  }
  template <bool kFull, bool kRows>
  PFS_INLINE void apply(int64_t i, int64_t n, const Channel& c) {
    Tile<A> z = affine(load_n<kFull>(static_cast<const T*>(args_.x) + i, n, numel_ - i), c);
    if constexpr (kResidual)
      z = z + load_n<kFull>(static_cast<const T*>(args_.residual) + i, n, numel_ - i);
    if constexpr (kAux == AuxKind::kBitmask) {
      const uint32_t bits = mask_to_bits<T>(slope_mask<act>(z));
      if constexpr (kRows) {
        write_bits<kFull, T>(static_cast<uint8_t*>(args_.aux), i, bits, n);
      } else {
        bits_.put(bits, n);
      }
    }
    if constexpr (kAux == AuxKind::kPreAct) store_n<kFull>(static_cast<T*>(args_.aux) + i, z, n);
    store_n<kFull>(static_cast<T*>(args_.y) + i, Tile<A>{activate<act>(z.a), activate<act>(z.b)},
                   n);
  }
  PFS_INLINE void finish() {
    if constexpr (kAux == AuxKind::kBitmask) bits_.finish();
  }

 private:
  const ForwardArgs args_;
  const int64_t numel_;
  BitWriter bits_;
};

// g = grad_y * act'(z), and what is made of it in the two passes of backward.
template <class T, SlopeSource source>
class Backward {
 public:
  using A = Acc<T>;
  struct Channel {
    Affine<A> affine;
    Tile<A> centred_factor, offset;
  };
  static constexpr bool kRecomputes =
      source == SlopeSource::kRelu || source == SlopeSource::kRelu6 ||
      source == SlopeSource::kSilu || source == SlopeSource::kHardswish;

  Backward(const BackwardArgs& args, int64_t numel) : args_(args), numel_(numel) {}

  PFS_INLINE const A* values(const void* p) const { return static_cast<const A*>(p); }

  template <bool kFull>
  PFS_INLINE Tile<A> slope_times_grad(int64_t i, int64_t n, Tile<A> x, const Affine<A>& c) const {
    const Tile<A> grad = load_n<kFull>(static_cast<const T*>(args_.grad_y) + i, n, numel_ - i);
    if constexpr (kRecomputes) return times_slope<static_cast<Act>(source)>(grad, affine(x, c));
    if constexpr (source == SlopeSource::kBitmask) {
      return keep(
          grad, bits_to_mask<T>(read_bits<kFull, T>(static_cast<const uint8_t*>(args_.aux), i, n)));
    }
    if constexpr (source == SlopeSource::kSavedSilu || source == SlopeSource::kSavedHardswish) {
      constexpr Act act = source == SlopeSource::kSavedSilu ? Act::kSilu : Act::kHardswish;
      return times_slope<act>(grad,
                              load_n<kFull>(static_cast<const T*>(args_.aux) + i, n, numel_ - i));
    }
    return grad;
  }

 protected:
  const BackwardArgs args_;
  const int64_t numel_;
};

template <class T, SlopeSource source>
class Reduce : public Backward<T, source> {
 public:
  using A = Acc<T>;
  using Channel = Affine<A>;
  using Backward<T, source>::Backward;

  PFS_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(static_cast<const T*>(this->args_.x) + i, 0, 3);
    __builtin_prefetch(static_cast<const T*>(this->args_.grad_y) + i, 0, 3);
  }
  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    const BackwardArgs& args = this->args_;
    return {parameter<kRows>(this->values(args.mean), i),
            parameter<kRows>(this->values(args.scale), i),
            parameter<kRows>(this->values(args.shift), i)};
  }
  template <bool kFull>
  PFS_INLINE void add(int64_t i, int64_t n, const Channel& c, Tile<A>& sum_g,
                      Tile<A>& sum_gx) const {
    const Tile<A> x = load_n<kFull>(static_cast<const T*>(this->args_.x) + i, n, this->numel_ - i);
    Tile<A> g = this->template slope_times_grad<kFull>(i, n, x, c);
    Tile<A> centred = x - c.mean;
    if (!kFull) {  // both factors: another channel's infinity times 0 would be NaN
      const TileMask<A> mask = bits_to_mask<T>(low_bits(n));
      g = keep(g, mask);
      centred = keep(centred, mask);
    }
    sum_g = sum_g + g;
    sum_gx = muladd(g, centred, sum_gx);
  }
};

template <class T, SlopeSource source>
class Apply : public Backward<T, source> {
 public:
  using A = Acc<T>;
  using Base = Backward<T, source>;
  using Channel = typename Base::Channel;
  using Base::Base;

  template <bool kRows>
  PFS_INLINE Channel channel(int64_t i) const {
    const BackwardArgs& args = this->args_;
    Channel c;
    c.affine = {parameter<kRows>(this->values(args.mean), i),
                parameter<kRows>(this->values(args.scale), i),
                parameter<kRows>(this->values(args.shift), i)};
    c.centred_factor = parameter<kRows>(this->values(args.centred_factor), i);
    c.offset = parameter<kRows>(this->values(args.offset), i);
    return c;
  }
  template <bool kFull, bool kRows>
  PFS_INLINE void apply(int64_t i, int64_t n, const Channel& c) const {
    const BackwardArgs& args = this->args_;
    const Tile<A> x = load_n<kFull>(static_cast<const T*>(args.x) + i, n, this->numel_ - i);
    const Tile<A> g = this->template slope_times_grad<kFull>(i, n, x, c.affine);
    if (args.grad_residual != nullptr)
      store_n<kFull>(static_cast<T*>(args.grad_residual) + i, g, n);
    if (args.grad_x == nullptr) return;
    Tile<A> grad_x = c.affine.scale * g;
    if (args.training)
      grad_x = muladd(c.affine.scale, g, muladd(x - c.affine.mean, c.centred_factor, c.offset));
    store_n<kFull>(static_cast<T*>(args.grad_x) + i, grad_x, n);
  }
  PFS_INLINE void finish() const {}
};

}  // namespace
}  // namespace pfs::cpu
