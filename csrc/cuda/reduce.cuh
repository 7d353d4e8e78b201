// Per-channel reductions: what one thread accumulates, how two accumulators merge, and the merge
// over a block. No atomics: the order of every sum follows from the shape alone.
#ifndef PFS_CUDA_REDUCE_CUH_
#define PFS_CUDA_REDUCE_CUH_

#include "vector.cuh"

namespace pfs::cuda {

// Largest block of any kernel here. 256 threads of up to 128 registers leave two blocks per
// multiprocessor.
inline constexpr int kMaxThreads = 256;

// Count, mean and sum of squared deviations (M2) of K channels, all with the same count. Values are
// taken relative to a pivot from the channel itself, so that a mean much larger than the deviation
// costs no digits.
template <typename acc, int K>
struct Moments {
  acc values[2][K] = {};  // mean - pivot, M2
  acc count = 0;

  // Adds U packs of V values: V / K consecutive values per channel and pack. Welford's update in
  // blocks: the sums run over deviations from the mean so far, so no digits are lost however many
  // values came before.
  template <typename T, int V, int U>
  C10_HOST_DEVICE void add(const Pack<T, V> (&packs)[U], const acc (&pivot)[K]) {
    constexpr int kPerChannel = V / K;
    count += acc(U * kPerChannel);
    const acc inverse_count = quick_divide(acc(1), count);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      acc sum = 0, sum_of_squares = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int j = 0; j < kPerChannel; ++j) {
          const acc x = static_cast<acc>(packs[u].values[k * kPerChannel + j]);
          const acc deviation = (x - pivot[k]) - values[0][k];
          sum += deviation;
          sum_of_squares += deviation * deviation;
        }
      }
      const acc correction = sum * inverse_count;
      values[0][k] += correction;
      values[1][k] += sum_of_squares - sum * correction;
    }
  }

  // Chan, Golub and LeVeque's rule for joining two sets.
  C10_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == acc(0)) return;
    const acc total = count + other.count;
    const acc share = quick_divide(other.count, total);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const acc delta = other.values[0][k] - values[0][k];
      values[0][k] += delta * share;
      values[1][k] += other.values[1][k] + delta * delta * count * share;
    }
    count = total;
  }
};

// Two plain sums over K channels: S1 = sum g and S2 = sum g * (x - mean).
template <typename acc, int K>
struct Sums {
  acc values[2][K] = {};
  acc count = 0;  // not used; the block reduction carries it along

  C10_HOST_DEVICE void add(int k, acc g, acc centred) {
    values[0][k] += g;
    values[1][k] += g * centred;
  }

  C10_HOST_DEVICE void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[0][k] += other.values[0][k];
      values[1][k] += other.values[1][k];
    }
  }
};

#if defined(__CUDACC__) || defined(PFS_CUDA_EMULATION)

// Shared memory of block_reduce. Neighbouring threads are neighbours in each array: no bank
// conflicts.
template <typename acc, int K>
struct ReduceStorage {
  acc values[2 * K][kMaxThreads];
  acc count[kMaxThreads];
};

// Merges the accumulators of threads tid = ty * width + tx over ty in [0, height), as a tree; the
// result is that of ty = 0. Every thread of the block must call it, also one beyond width * height
// (its accumulator is not read).
template <typename Accumulator, typename acc, int K>
__device__ inline void block_reduce(Accumulator& mine, ReduceStorage<acc, K>& storage, int width,
                                    int height) {
  const int tid = static_cast<int>(threadIdx.x);
  const int ty = tid / width;
  for (int active = height; active > 1;) {
    // Rows [half, active) hand over to rows [0, active - half): readers and writers are never the
    // same rows.
    const int half = (active + 1) / 2;
    if (ty >= half && ty < active) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        storage.values[k][tid] = mine.values[0][k];
        storage.values[K + k][tid] = mine.values[1][k];
      }
      storage.count[tid] = mine.count;
    }
    __syncthreads();
    if (ty < active - half) {
      const int from = tid + half * width;
      Accumulator other;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        other.values[0][k] = storage.values[k][from];
        other.values[1][k] = storage.values[K + k][from];
      }
      other.count = storage.count[from];
      mine.merge(other);
    }
    // No second barrier: the next round writes rows [half', half), which nobody reads in this
    // round.
    active = half;
  }
}

#endif

}  // namespace pfs::cuda

#endif  // PFS_CUDA_REDUCE_CUH_
