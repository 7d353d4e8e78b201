// One step on all gates: a kernel that sums |gates| and counts the step, and one that takes it. The
// host learns nothing and waits for nothing, so that a whole search step can be captured in a CUDA
// graph.
#ifndef PFS_CUDA_GATE_STEP_CUH_
#define PFS_CUDA_GATE_STEP_CUH_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "launch.cuh"
#include "reduce.cuh"

namespace pfs::cuda {

// Blocks of the first kernel: one partial sum per thread of the second one's blocks.
inline constexpr int kMaxPartials = kMaxThreads;

struct StepOptions {
  double lr, beta1, beta2, eps, gamma, target;
  int64_t num_gates;
};

// Sum of one value per thread over the block; valid in thread 0.
template <typename acc>
__device__ acc block_sum(acc value, ReduceStorage<acc, 1>& storage) {
  Sums<acc, 1> sums;
  sums.values[0][0] = value;
  block_reduce(sums, storage, 1, kMaxThreads);
  return sums.values[0][0];
}

template <typename acc>
__global__ void __launch_bounds__(kMaxThreads)
    gate_sum_kernel(const acc* __restrict__ gates, int64_t size, acc* __restrict__ partial,
                    int64_t* __restrict__ step) {
  __shared__ ReduceStorage<acc, 1> storage;
  acc sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kMaxThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x; i < size;
       i += stride) {
    sum += gates[i] < acc(0) ? -gates[i] : gates[i];
  }
  sum = block_sum(sum, storage);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    // Here and not in the second kernel, all of whose blocks read it.
    if (blockIdx.x == 0) *step += 1;
  }
}

// What all gates share in one step.
template <typename acc>
struct StepScalars {
  acc regulariser;  // 2 gamma (m - target) / num_gates
  acc step_size;    // lr / (1 - beta1^step)
  acc sqrt_bias_correction2;
};

template <typename acc>
__global__ void __launch_bounds__(kMaxThreads)
    gate_step_kernel(acc* __restrict__ gates, const acc* __restrict__ grad,
                     acc* __restrict__ exp_avg, acc* __restrict__ exp_avg_sq,
                     const int64_t* __restrict__ step, int32_t* __restrict__ died_at, int64_t size,
                     const acc* __restrict__ partial, int num_partials, StepOptions options) {
  __shared__ ReduceStorage<acc, 1> storage;
  __shared__ StepScalars<acc> scalars;
  const int tid = static_cast<int>(threadIdx.x);
  const acc sum = block_sum(tid < num_partials ? partial[tid] : acc(0), storage);
  if (tid == 0) {
    const double count = static_cast<double>(options.num_gates);
    const double t = static_cast<double>(*step);
    scalars.regulariser = static_cast<acc>(
        2.0 * options.gamma * (static_cast<double>(sum) / count - options.target) / count);
    scalars.step_size = static_cast<acc>(options.lr / (1.0 - ::pow(options.beta1, t)));
    scalars.sqrt_bias_correction2 = static_cast<acc>(::sqrt(1.0 - ::pow(options.beta2, t)));
  }
  __syncthreads();

  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + tid;
  if (i >= size) return;
  const acc gate = gates[i];
  const acc sign = static_cast<acc>((gate > acc(0)) - (gate < acc(0)));
  const acc g = grad[i] + scalars.regulariser * sign;
  const acc one_minus_beta1 = static_cast<acc>(1.0 - options.beta1);
  const acc one_minus_beta2 = static_cast<acc>(1.0 - options.beta2);
  const acc m = exp_avg[i] + one_minus_beta1 * (g - exp_avg[i]);
  const acc v = static_cast<acc>(options.beta2) * exp_avg_sq[i] + one_minus_beta2 * g * g;
  exp_avg[i] = m;
  exp_avg_sq[i] = v;
  const acc denominator = ::sqrt(v) / scalars.sqrt_bias_correction2 + static_cast<acc>(options.eps);
  const acc moved = gate - scalars.step_size * (m / denominator);
  // NaN fails both comparisons and stays.
  const acc updated = moved < acc(0) ? acc(0) : (moved > acc(1) ? acc(1) : moved);
  gates[i] = updated;
  if (updated > acc(0)) {
    died_at[i] = -1;
  } else if (updated == acc(0) && died_at[i] < 0) {
    died_at[i] = static_cast<int32_t>(*step);
  }
}

// What a step reads and changes. All are [size] in device memory, but step [1].
template <typename acc>
struct GateArrays {
  acc* gates;
  const acc* grad;
  acc* exp_avg;
  acc* exp_avg_sq;
  int64_t* step;
  int32_t* died_at;
  int64_t size;
};

inline int64_t gate_blocks(int64_t size) { return (size + kMaxThreads - 1) / kMaxThreads; }

// Partial sums of |gates|: at least one, since the first kernel also counts the step.
inline int num_partials(int64_t size) {
  return static_cast<int>(std::clamp<int64_t>(gate_blocks(size), 1, kMaxPartials));
}

// partial: [num_partials(size)], for what the first kernel hands to the second.
template <typename acc>
void take_gate_step(const DeviceScope& scope, const GateArrays<acc>& a, acc* partial,
                    const StepOptions& options) {
  const int partials = num_partials(a.size);
  launch(scope, gate_sum_kernel<acc>, partials, 1, kMaxThreads, a.gates, a.size, partial, a.step);
  if (a.size == 0) return;
  launch(scope, gate_step_kernel<acc>, gate_blocks(a.size), 1, kMaxThreads, a.gates, a.grad,
         a.exp_avg, a.exp_avg_sq, a.step, a.died_at, a.size, partial, partials, options);
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_GATE_STEP_CUH_
