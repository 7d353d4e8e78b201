// Kernels of _bn_gate_act_backward: grad_sums (read grad_y, x) -> channel_grads (per channel) ->
// apply_backward (read grad_y, x, write grad_x and grad_residual).
#ifndef PFS_CUDA_BN_GATE_ACT_BACKWARD_CUH_
#define PFS_CUDA_BN_GATE_ACT_BACKWARD_CUH_

#include "bn_gate_act_forward.cuh"

namespace pfs::cuda {

// Where act'(z) comes from.
enum class Source : int {
  kClamp = 0,   // z recomputed from x; identity also when there was a residual, since z does not
                // matter then
  kSmooth = 1,  // z recomputed from x
  kMask = 2,    // one bit per value
  kPreAct = 3,  // z saved in the dtype of x
};

constexpr bool recomputes_z(Source s) { return s == Source::kClamp || s == Source::kSmooth; }

// grad_x = scale * g + slope * (x - mean) + offset
enum GradRow : int { kSlopeRow = 3, kOffsetRow = 4, kNumGradRows = 5 };

// The part of aux that belongs to one piece.
template <typename T, int V, Source kSource>
struct AuxPiece {
  Pack<T, kSource == Source::kPreAct ? V : 1> pre_act;
  unsigned bits;

  C10_HOST_DEVICE void load(const void* __restrict__ aux, int64_t offset) {
    if constexpr (kSource == Source::kPreAct)
      pre_act = load_pack<V>(static_cast<const T*>(aux) + offset);
    if constexpr (kSource == Source::kMask) {
      // A piece never straddles bytes: its offset is a multiple of its size, which divides 8.
      static_assert(8 % V == 0);
      bits = static_cast<unsigned>(static_cast<const uint8_t*>(aux)[offset >> 3]) >> (offset & 7);
    }
  }

  // g = grad_y * act'(z); z is used only if the source recomputes it.
  template <typename acc>
  C10_HOST_DEVICE acc grad_z(int v, acc grad_y, acc z, const ActParams<acc>& act) const {
    if constexpr (kSource == Source::kClamp) {
      return activate_backward<ActFamily::kClamp>(grad_y, z, act);
    } else if constexpr (kSource == Source::kSmooth) {
      return activate_backward<ActFamily::kSmooth>(grad_y, z, act);
    } else if constexpr (kSource == Source::kMask) {
      return ((bits >> v) & 1u) != 0 ? grad_y : acc(0);
    } else {
      return activate_backward<ActFamily::kSmooth>(grad_y, static_cast<acc>(pre_act.values[v]),
                                                   act);
    }
  }
};

// partial: [2, splits, C] = (sum g, sum g * (x - mean)) of every chunk. grid = (tiles, splits).
template <typename T, int V, Layout kLayout, Source kSource>
__global__ void __launch_bounds__(kMaxThreads)
    grad_sums_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                     const void* __restrict__ aux, const acc_t<T>* __restrict__ mean,
                     const acc_t<T>* __restrict__ var, ChannelParams<acc_t<T>> params, acc_t<T> eps,
                     ActParams<acc_t<T>> act, Grid grid, acc_t<T>* __restrict__ partial) {
  using acc = acc_t<T>;
  constexpr int kChannels = Cursor<kLayout, V>::kChannels;
  constexpr int kPerChannel = V / kChannels;
  constexpr int kUnroll = 4;
  __shared__ ReduceStorage<acc, kChannels> storage;

  Cursor<kLayout, V> cursor(grid, blockIdx.x, blockIdx.y, static_cast<int>(threadIdx.x));
  Sums<acc, kChannels> sums;
  if (cursor.count() > 0) {
    Affine<acc> affine[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t c = cursor.channel() + k;
      affine[k] = params.affine(c, mean[c], inverse_std(var[c], eps));
    }
    for_each_group<kUnroll>(cursor, [&](auto unroll, const int64_t* offsets) {
      constexpr int U = decltype(unroll)::value;
      Pack<T, V> grads[U], in[U];
      AuxPiece<T, V, kSource> pieces[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        grads[u] = load_pack<V>(grad_y + offsets[u]);
        in[u] = load_pack<V>(x + offsets[u]);
        pieces[u].load(aux, offsets[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Affine<acc>& f = affine[v / kPerChannel];
          const acc value = static_cast<acc>(in[u].values[v]);
          const acc g = pieces[u].grad_z(v, static_cast<acc>(grads[u].values[v]), f(value), act);
          sums.add(v / kPerChannel, g, value - f.mean);
        }
      }
    });
  }
  block_reduce(sums, storage, grid.width, grid.height);

  if (cursor.holds_result()) {
    const int64_t channels = grid.shape.channels;
    acc* sum_g = partial + blockIdx.y * channels + cursor.channel();
    acc* sum_g_centred = sum_g + grid.splits * channels;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      sum_g[k] = sums.values[0][k];
      sum_g_centred[k] = sums.values[1][k];
    }
  }
}

// Gradients of the per-channel arguments; a null pointer is not asked for.
template <typename acc>
struct ChannelGrads {
  acc* __restrict__ gate;
  acc* __restrict__ weight;
  acc* __restrict__ bias;
};

// Joins the chunks, writes the per-channel gradients and the coefficients [5, C] of apply_backward.
// splits = 0: no sums were taken, because nothing needs them. grid = (ceil(C / 8)), 8 x 32 threads.
template <typename acc>
__global__ void __launch_bounds__(kMaxThreads)
    channel_grads_kernel(const acc* __restrict__ partial, int64_t splits, Shape shape,
                         const acc* __restrict__ mean, const acc* __restrict__ var,
                         ChannelParams<acc> params, bool training, acc eps, ChannelGrads<acc> grads,
                         acc* __restrict__ coefficients) {
  __shared__ ReduceStorage<acc, 1> storage;
  const int64_t channels = shape.channels;
  const int64_t c =
      static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x % kChannelThreads;
  const int row = static_cast<int>(threadIdx.x) / kChannelThreads;

  Sums<acc, 1> sums;
  if (c < channels) {
    for (int64_t split = row; split < splits; split += kSplitThreads) {
      sums.values[0][0] += partial[split * channels + c];
      sums.values[1][0] += partial[(splits + split) * channels + c];
    }
  }
  block_reduce(sums, storage, kChannelThreads, kSplitThreads);

  if (c < channels && row == 0) {
    const acc rstd = inverse_std(var[c], eps);
    const Affine<acc> f = params.affine(c, mean[c], rstd);
    const acc s1 = sums.values[0][0];
    const acc s2 = sums.values[1][0] * rstd;
    if (grads.gate != nullptr) grads.gate[c] = params.weight_of(c) * s2 + params.bias_of(c) * s1;
    if (grads.weight != nullptr) grads.weight[c] = params.gate_of(c) * s2;
    if (grads.bias != nullptr) grads.bias[c] = params.gate_of(c) * s1;
    const acc count = static_cast<acc>(shape.values_per_channel());
    coefficients[kMeanRow * channels + c] = f.mean;
    coefficients[kScaleRow * channels + c] = f.scale;
    coefficients[kShiftRow * channels + c] = f.shift;
    coefficients[kSlopeRow * channels + c] = training ? -f.scale * rstd * (s2 / count) : acc(0);
    coefficients[kOffsetRow * channels + c] = training ? -f.scale * (s1 / count) : acc(0);
  }
}

// grad_x and grad_residual (either may be null). grid = (tiles, splits), the chunks in reverse as
// in apply_kernel.
template <typename T, int V, Layout kLayout, Source kSource>
__global__ void __launch_bounds__(kMaxThreads)
    apply_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                          const void* __restrict__ aux, const acc_t<T>* __restrict__ coefficients,
                          ActParams<acc_t<T>> act, bool training, Grid grid, T* __restrict__ grad_x,
                          T* __restrict__ grad_residual) {
  using acc = acc_t<T>;
  constexpr int kChannels = Cursor<kLayout, V>::kChannels;
  constexpr int kPerChannel = V / kChannels;
  constexpr int kUnroll = V == 1 ? 4 : 2;

  Cursor<kLayout, V> cursor(grid, blockIdx.x, grid.splits - 1 - blockIdx.y,
                            static_cast<int>(threadIdx.x));
  if (cursor.count() == 0) return;
  // Without training x enters only through a recomputed z.
  const bool needs_x = training || (recomputes_z(kSource) && !act.is_identity);
  const acc* source = coefficients + cursor.channel();
  const int64_t channels = grid.shape.channels;
  acc mean[kChannels], scale[kChannels], shift[kChannels], slope[kChannels], offset[kChannels];
  load_channels(mean, source + kMeanRow * channels);
  load_channels(scale, source + kScaleRow * channels);
  if constexpr (recomputes_z(kSource)) load_channels(shift, source + kShiftRow * channels);
  load_channels(slope, source + kSlopeRow * channels);
  load_channels(offset, source + kOffsetRow * channels);

  for_each_group<kUnroll>(cursor, [&](auto unroll, const int64_t* offsets) {
    constexpr int U = decltype(unroll)::value;
    Pack<T, V> grads[U], in[U] = {};
    AuxPiece<T, V, kSource> pieces[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      grads[u] = load_pack<V>(grad_y + offsets[u]);
      if (needs_x) in[u] = load_pack<V>(x + offsets[u]);
      pieces[u].load(aux, offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<T, V> out_x, out_residual;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int k = v / kPerChannel;
        const acc value = static_cast<acc>(in[u].values[v]);
        acc z = 0;
        if constexpr (recomputes_z(kSource)) z = Affine<acc>{mean[k], scale[k], shift[k]}(value);
        const acc g = pieces[u].grad_z(v, static_cast<acc>(grads[u].values[v]), z, act);
        // Without training x must not enter here: an infinite one times a slope of 0 would be NaN.
        const acc statistics = training ? slope[k] * (value - mean[k]) + offset[k] : acc(0);
        out_x.values[v] = static_cast<T>(scale[k] * g + statistics);
        out_residual.values[v] = static_cast<T>(g);
      }
      if (grad_x != nullptr) store_pack<V>(grad_x + offsets[u], out_x);
      if (grad_residual != nullptr) store_pack<V>(grad_residual + offsets[u], out_residual);
    }
  });
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_BN_GATE_ACT_BACKWARD_CUH_
