// How a tensor is cut into chunks. The chunks depend on its shape and layout alone, never on the
// number of threads, and partial sums are merged in their order: results are the same for any
// number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <vector>

#include "bn_gate_act_kernel.h"
#include "shared_blocks.h"

namespace pfs::cpu {

// Values per chunk: small enough that a few threads share even small layers, large enough to hide
// what a chunk costs.
constexpr int64_t kChunk = 32 * 1024;
// Rows shorter than this are merged into one row, so that the loop over a row is worth starting.
constexpr int64_t kMinPeriod = 256;
// Contiguous tensors use row mode if their planes are shorter than kShortPlane and a sample fits
// kMaxShortRow.
constexpr int64_t kShortPlane = 32;
constexpr int64_t kMaxShortRow = 16 * 1024;

// Memory is a sequence of pixels of all channels, or of samples.
inline Layout make_rows_layout(const at::Tensor& x, int64_t tile, int64_t inner = 1) {
  Layout layout{x.numel(), x.size(1), inner, 0, 0};
  if (layout.numel == 0) return layout;
  const int64_t step = std::max<int64_t>(tile, 8);
  layout.unit = layout.channels * layout.inner;
  while (layout.unit % step != 0 || layout.unit < 2 * tile) layout.unit *= 2;
  layout.period = layout.unit;
  while (layout.period < kMinPeriod) layout.period *= 2;
  return layout;
}

inline Layout make_layout(const at::Tensor& x, int64_t tile) {
  const int64_t channels = x.size(1);
  int64_t inner = 1;
  if (x.numel() > 0 && x.is_contiguous() && channels > 1) {
    inner = x.numel() / (x.size(0) * channels);
    const bool is_short = inner < kShortPlane && channels * inner <= kMaxShortRow;
    if (inner > 1 && !is_short) return {x.numel(), channels, inner, 0, 0};
  }
  return make_rows_layout(x, tile, inner);
}

// One scratch buffer of doubles, aligned for vectors.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(c10::GetCPUAllocator()->allocate(count * sizeof(double))) {}
  double* get() { return static_cast<double*>(data_.get()); }

 private:
  c10::DataPtr data_;
};

// The chunks of a reduction: ranges of rows, or ranges of planes.
class ReductionPlan {
 public:
  explicit ReductionPlan(const Layout& layout) : layout_(layout) {
    if (layout.period > 0) {
      rows_ = layout.period * std::max<int64_t>(16, kChunk / layout.period);
      num_chunks_ = at::divup(layout.numel, rows_);
      return;
    }
    num_samples_ = layout.numel / (layout.channels * layout.inner);
    run_ = std::min(layout.inner, 2 * kChunk);
    channels_ = std::clamp<int64_t>(kChunk / run_, 1, layout.channels);
    samples_ = std::clamp<int64_t>(kChunk / (run_ * channels_), 1, num_samples_);
    num_runs_ = at::divup(layout.inner, run_);
    num_channel_blocks_ = at::divup(layout.channels, channels_);
    num_chunks_ = at::divup(num_samples_, samples_) * num_channel_blocks_ * num_runs_;
  }

  int64_t num_chunks() const { return num_chunks_; }
  // Partial results per channel: chunks of different channels share one.
  int64_t num_partials() const {
    return layout_.period > 0 ? num_chunks_ : num_chunks_ / num_channel_blocks_;
  }

  int64_t begin(int64_t chunk) const { return chunk * rows_; }
  int64_t end(int64_t chunk) const { return std::min((chunk + 1) * rows_, layout_.numel); }

  // Order of chunks: samples, channels, runs, the last fastest.
  PlaneRange planes(int64_t chunk) const {
    const int64_t run = chunk % num_runs_;
    const int64_t block = chunk / num_runs_ % num_channel_blocks_;
    const int64_t sample = chunk / num_runs_ / num_channel_blocks_;
    return {sample * samples_, std::min((sample + 1) * samples_, num_samples_),
            block * channels_, std::min((block + 1) * channels_, layout_.channels),
            run * run_,        std::min((run + 1) * run_, layout_.inner)};
  }
  int64_t partial(int64_t chunk) const {
    if (layout_.period > 0) return chunk;
    return chunk / (num_runs_ * num_channel_blocks_) * num_runs_ + chunk % num_runs_;
  }
  // Values per channel in partial result `partial`.
  int64_t count(int64_t partial) const {
    if (layout_.period > 0) return (end(partial) - begin(partial)) / layout_.channels;
    const PlaneRange range =
        planes(partial / num_runs_ * num_runs_ * num_channel_blocks_ + partial % num_runs_);
    return (range.n1 - range.n0) * (range.s1 - range.s0);
  }

 private:
  Layout layout_;
  int64_t num_chunks_ = 0;
  int64_t rows_ = 0;
  int64_t num_samples_ = 0, run_ = 0, channels_ = 1, samples_ = 0, num_runs_ = 1,
          num_channel_blocks_ = 1;
};

// Calls f(begin, end) on chunks of the tensor in memory order. Each thread walks its chunks
// backwards: the pass before ended with the last of them, which are still in its cache.
template <class F>
void for_each_chunk_backwards(const Layout& layout, const F& f) {
  const int64_t step =
      layout.period > 0 ? layout.period * std::max<int64_t>(1, kChunk / layout.period) : kChunk;
  share_out(at::divup(layout.numel, step), [&](SharedBlocks::Share& share) {
    for (int64_t chunk; (chunk = share.next_backwards()) >= 0;)
      f(chunk * step, std::min((chunk + 1) * step, layout.numel));
  });
}

}  // namespace pfs::cpu
