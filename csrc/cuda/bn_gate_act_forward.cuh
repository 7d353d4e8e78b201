// Kernels of bn_gate_act: batch_moments (read x) -> channel_affine (per channel) -> apply (read x,
// write y).
#ifndef PFS_CUDA_BN_GATE_ACT_FORWARD_CUH_
#define PFS_CUDA_BN_GATE_ACT_FORWARD_CUH_

#include "geometry.cuh"

namespace pfs::cuda {

// Channels and rows of threads of the per-channel kernels: 8 neighbouring channels fill a 32-byte
// sector.
inline constexpr int kChannelThreads = 8;
inline constexpr int kSplitThreads = 32;
static_assert(kChannelThreads * kSplitThreads <= kMaxThreads);

// Per-channel coefficients that a kernel finishes for the next one: rows of [num_rows, C].
enum AffineRow : int { kMeanRow = 0, kScaleRow = 1, kShiftRow = 2, kNumAffineRows = 3 };

// Moments of every chunk of x, relative to the first value of each channel.
// partial: [2, splits, C] = (mean - pivot, M2). grid = (tiles, splits).
template <typename T, int V, Layout kLayout>
__global__ void __launch_bounds__(kMaxThreads)
    batch_moments_kernel(const T* __restrict__ x, Grid grid, acc_t<T>* __restrict__ partial) {
  using acc = acc_t<T>;
  constexpr int kChannels = Cursor<kLayout, V>::kChannels;
  constexpr int kUnroll = V == 1 ? 8 : 4;
  __shared__ ReduceStorage<acc, kChannels> storage;

  Cursor<kLayout, V> cursor(grid, blockIdx.x, blockIdx.y, static_cast<int>(threadIdx.x));
  Moments<acc, kChannels> moments;
  if (cursor.count() > 0) {
    acc pivot[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      pivot[k] = static_cast<acc>(x[grid.shape.channel_offset(cursor.channel() + k)]);
    }
    for_each_group<kUnroll>(cursor, [&](auto unroll, const int64_t* offsets) {
      Pack<T, V> packs[decltype(unroll)::value];
#pragma unroll
      for (int u = 0; u < decltype(unroll)::value; ++u) packs[u] = load_pack<V>(x + offsets[u]);
      moments.add(packs, pivot);
    });
  }
  block_reduce(moments, storage, grid.width, grid.height);

  if (cursor.holds_result()) {
    const int64_t channels = grid.shape.channels;
    acc* mean = partial + blockIdx.y * channels + cursor.channel();
    acc* m2 = mean + grid.splits * channels;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      mean[k] = moments.values[0][k];
      m2[k] = moments.values[1][k];
    }
  }
}

// Joins the chunks, writes mean and var [C] and the coefficients affine [3, C] that apply needs.
// Without training it copies the running statistics instead. grid = (ceil(C / 8)), 8 x 32 threads.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    channel_affine_kernel(const T* __restrict__ x, Grid grid, const acc_t<T>* __restrict__ partial,
                          const acc_t<T>* __restrict__ running_mean,
                          const acc_t<T>* __restrict__ running_var, ChannelParams<acc_t<T>> params,
                          bool training, acc_t<T> eps, acc_t<T>* __restrict__ mean,
                          acc_t<T>* __restrict__ var, acc_t<T>* __restrict__ affine) {
  using acc = acc_t<T>;
  __shared__ ReduceStorage<acc, 1> storage;
  const int64_t channels = grid.shape.channels;
  const int64_t c =
      static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x % kChannelThreads;
  const int row = static_cast<int>(threadIdx.x) / kChannelThreads;
  const int64_t count = grid.shape.values_per_channel();

  Moments<acc, 1> moments;
  if (training) {
    if (c < channels) {
      const int64_t chunk_values = grid.chunk_values();
      for (int64_t split = row; split < grid.splits; split += kSplitThreads) {
        const int64_t left = count - split * chunk_values;
        Moments<acc, 1> chunk;
        chunk.values[0][0] = partial[split * channels + c];
        chunk.values[1][0] = partial[(grid.splits + split) * channels + c];
        chunk.count = static_cast<acc>(left < chunk_values ? left : chunk_values);
        moments.merge(chunk);
      }
    }
    block_reduce(moments, storage, kChannelThreads, kSplitThreads);
  }

  if (c < channels && row == 0) {
    acc channel_mean, channel_var;
    if (training) {
      const acc m2 = moments.values[1][0];
      channel_mean = static_cast<acc>(x[grid.shape.channel_offset(c)]) + moments.values[0][0];
      // Rounding can leave M2 a hair below 0; NaN must stay NaN.
      channel_var = (m2 < acc(0) ? acc(0) : m2) / static_cast<acc>(count);
    } else {
      channel_mean = running_mean[c];
      channel_var = running_var[c];
    }
    mean[c] = channel_mean;
    var[c] = channel_var;
    const Affine<acc> f = params.affine(c, channel_mean, inverse_std(channel_var, eps));
    affine[kMeanRow * channels + c] = f.mean;
    affine[kScaleRow * channels + c] = f.scale;
    affine[kShiftRow * channels + c] = f.shift;
  }
}

// K neighbouring per-channel values.
template <int K, typename acc>
C10_HOST_DEVICE inline void load_channels(acc (&values)[K], const acc* __restrict__ source) {
  const Pack<acc, K> pack = load_pack<K>(source);
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = pack.values[k];
}

// What apply does after the affine map.
enum class Epilogue : int {
  kClamp = 0,              // y = clamp(z)
  kClampResidual = 1,      // z += residual
  kClampResidualMask = 2,  // ... and aux = one bit per value, a whole byte per piece: V = 8
  kSmooth = 3,             // y = silu(z) or hardswish(z)
  kSmoothResidual = 4,     // z += residual, aux = z
};

constexpr bool adds_residual(Epilogue e) { return e != Epilogue::kClamp && e != Epilogue::kSmooth; }
constexpr ActFamily family_of(Epilogue e) {
  return e == Epilogue::kSmooth || e == Epilogue::kSmoothResidual ? ActFamily::kSmooth
                                                                  : ActFamily::kClamp;
}

// y = act(affine(x) + residual). grid = (tiles, splits). Blocks take the chunks in reverse, because
// the pass before ends with the last ones, which are still in the cache.
template <typename T, int V, Layout kLayout, Epilogue kEpilogue>
__global__ void __launch_bounds__(kMaxThreads)
    apply_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                 const acc_t<T>* __restrict__ affine, ActParams<acc_t<T>> act, Grid grid,
                 T* __restrict__ y, void* __restrict__ aux) {
  using acc = acc_t<T>;
  constexpr int kChannels = Cursor<kLayout, V>::kChannels;
  constexpr int kPerChannel = V / kChannels;
  constexpr int kUnroll = V == 1 ? 8 : (V * sizeof(T) > 16 ? 2 : 4);
  static_assert(kEpilogue != Epilogue::kClampResidualMask || V == 8,
                "a thread must own whole bytes of the mask");

  Cursor<kLayout, V> cursor(grid, blockIdx.x, grid.splits - 1 - blockIdx.y,
                            static_cast<int>(threadIdx.x));
  if (cursor.count() == 0) return;
  const int64_t channels = grid.shape.channels;
  acc mean[kChannels], scale[kChannels], shift[kChannels];
  load_channels(mean, affine + kMeanRow * channels + cursor.channel());
  load_channels(scale, affine + kScaleRow * channels + cursor.channel());
  load_channels(shift, affine + kShiftRow * channels + cursor.channel());

  for_each_group<kUnroll>(cursor, [&](auto unroll, const int64_t* offsets) {
    constexpr int U = decltype(unroll)::value;
    Pack<T, V> in[U];
    [[maybe_unused]] Pack<T, V> skip[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      in[u] = load_pack<V>(x + offsets[u]);
      if constexpr (adds_residual(kEpilogue)) skip[u] = load_pack<V>(residual + offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<T, V> out;
      [[maybe_unused]] Pack<T, V> pre_act;
      [[maybe_unused]] unsigned bits = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int k = v / kPerChannel;
        acc z = Affine<acc>{mean[k], scale[k], shift[k]}(static_cast<acc>(in[u].values[v]));
        if constexpr (adds_residual(kEpilogue)) z += static_cast<acc>(skip[u].values[v]);
        if constexpr (kEpilogue == Epilogue::kSmoothResidual) pre_act.values[v] = static_cast<T>(z);
        if constexpr (kEpilogue == Epilogue::kClampResidualMask)
          bits |= clamp_passes(z, act) ? 1u << v : 0u;
        out.values[v] = static_cast<T>(activate<family_of(kEpilogue)>(z, act));
      }
      store_pack<V>(y + offsets[u], out);
      if constexpr (kEpilogue == Epilogue::kSmoothResidual)
        store_pack<V>(static_cast<T*>(aux) + offsets[u], pre_act);
      if constexpr (kEpilogue == Epilogue::kClampResidualMask) {
        static_cast<uint8_t*>(aux)[offsets[u] >> 3] = static_cast<uint8_t>(bits);
      }
    }
  });
}

// apply with a bitmask for shapes and addresses that the packed kernel cannot take: a thread owns
// the 8 values of one byte of the mask, whatever channels they lie in; the last byte may cover
// fewer. grid = any.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    apply_masked_flat_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                             const acc_t<T>* __restrict__ affine, ActParams<acc_t<T>> act,
                             Shape shape, T* __restrict__ y, uint8_t* __restrict__ aux) {
  using acc = acc_t<T>;
  const int64_t numel = shape.numel();
  const int64_t num_bytes = (numel + 7) / 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; byte < num_bytes;
       byte += step) {
    const int64_t begin = byte * 8;
    const int size = static_cast<int>(numel - begin < 8 ? numel - begin : 8);
    int64_t c = shape.channel_at(begin);
    int64_t position = begin % shape.plane;
    unsigned bits = 0;
    for (int v = 0; v < size; ++v) {
      const Affine<acc> f{affine[kMeanRow * shape.channels + c],
                          affine[kScaleRow * shape.channels + c],
                          affine[kShiftRow * shape.channels + c]};
      const acc z = f(static_cast<acc>(x[begin + v])) + static_cast<acc>(residual[begin + v]);
      y[begin + v] = static_cast<T>(activate<ActFamily::kClamp>(z, act));
      bits |= clamp_passes(z, act) ? 1u << v : 0u;
      if (++position == shape.plane) {
        position = 0;
        c = c + 1 == shape.channels ? 0 : c + 1;
      }
    }
    aux[byte] = static_cast<uint8_t>(bits);
  }
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_BN_GATE_ACT_FORWARD_CUH_
