// The activations that bn_gate_act can fuse. Plain C++ without ATen, so that the per-ISA files may
// include it.
#pragma once

namespace pfs {

enum class Act : int { kIdentity = 0, kRelu = 1, kRelu6 = 2, kSilu = 3, kHardswish = 4 };

// What bn_gate_act keeps beside x when there is a residual: with one, z cannot be recomputed from x
// alone.
enum class AuxKind : int {
  kNone = 0,     // uint8 [0]
  kBitmask = 1,  // uint8 [ceil(numel / 8)]: bit i % 8 of byte i / 8 is act'(z) of the i-th value in
                 // memory order
  kPreAct = 2,   // z, in the shape, dtype and layout of y
};

inline AuxKind aux_kind(Act act, bool has_residual) {
  if (!has_residual || act == Act::kIdentity) return AuxKind::kNone;
  return act == Act::kRelu || act == Act::kRelu6 ? AuxKind::kBitmask : AuxKind::kPreAct;
}

}  // namespace pfs
