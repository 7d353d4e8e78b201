// The work of one Winograd convolution: blocking and threads. The arithmetic is in
// winograd_kernel_impl.h.
//
// Weights are transformed in every call: for most layers that is less than 3 % of it, and the
// transformed ones, up to 4 times as large as the weights, need no memory between calls and never go
// stale.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "gemm_kernel.h"
#include "kept_memory.h"
#include "shared_blocks.h"
#include "winograd_kernel.h"

namespace pfs::cpu {

// Transformed weights up to this size are made once, and each thread takes blocks of tiles from
// input to output; larger ones are made by chunks of output channels, which the threads share out.
constexpr int64_t kWholeWeightBytes = int64_t{4} << 20;
// What a block of tiles may take, transformed: most of a second-level cache of 512 KiB ...
constexpr int64_t kBlockBytes = 440 << 10;
// ... but not so few tiles that reading the weights again for each block takes longer than that.
constexpr int64_t kMinTiles = 12;
// Transformed input of all tiles that are worked on at once, where weights come by chunks; and of
// their products, for each thread.
constexpr int64_t kTilesBytes = int64_t{6} << 20;
constexpr int64_t kChunkChannels = 64;
// Rows of all frequencies at multiples of a power of two would share few sets of a cache.
constexpr int64_t kSkew = 16;

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

class WinogradBuffer {
 public:
  explicit WinogradBuffer(int64_t floats)
      : data_(allocate(static_cast<size_t>(floats) * sizeof(float))) {}
  float* get() const { return static_cast<float*>(data_.get()); }

 private:
  c10::DataPtr data_;
};

// One call: the shape, the kernels, and where the tensors are.
struct WinogradPass {
  const WinogradKernels& kernels;
  WinogradShape shape;
  const void* x;
  const void* weight;
  const float* bias;
  void* y;
  const void* added = nullptr;  // to y, laid out as it is

  int64_t frequencies() const { return (kernels.tile + 2) * (kernels.tile + 2); }
  int64_t padded(int64_t channels) const { return round_up(channels, kernels.lanes); }

  // First pixel of the row of tiles that a tile is in: what lies between two of them is about the
  // memory of the tiles between.
  int64_t first_row(int64_t tile, int64_t height) const {
    const int64_t line = tile / shape.tiles_x;
    const int64_t row = std::min(line % shape.tiles_y * kernels.tile, height);
    return line / shape.tiles_y * height + row;
  }
  const void* first_output(const void* of, int64_t tile) const {
    const int64_t value = first_row(tile, shape.out_height) * shape.out_width * shape.out_channels;
    return static_cast<const char*>(of) + value * kernels.itemsize;
  }
  // What the outputs of tiles are written to, and what is added to them.
  Ahead outputs_of(int64_t begin, int64_t end) const {
    return {first_output(y, begin), first_output(y, end)};
  }
  Ahead added_of(int64_t begin, int64_t end) const {
    if (added == nullptr) return {};
    return {first_output(added, begin), first_output(added, end)};
  }

  int64_t spectrum_floats(int64_t rows, int64_t row) const {
    return frequencies() * (rows * row + kSkew);
  }
  Spectrum spectrum(float* data, int64_t rows, int64_t row) const {
    return {data, row, rows * row + kSkew};
  }
  int64_t weight_floats(int64_t width) const {
    return frequencies() * (shape.in_channels * width + kSkew);
  }
  PackedWeights weights(float* data, int64_t width) const {
    return {data, shape.in_channels * width + kSkew, width};
  }
};

inline PackedWeights transform_weights(const WinogradPass& pass, float* memory) {
  const WinogradShape& s = pass.shape;
  const int64_t width = pass.padded(s.out_channels), lanes = pass.kernels.lanes;
  const PackedWeights weights = pass.weights(memory, width);
  // By panels, all but the last of two vectors; every panel begins at begin * depth floats.
  const int64_t panels = std::max<int64_t>(width / (2 * lanes), 1);
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = panel * 2 * lanes;
      const PackedWeights part{weights.data + begin * s.in_channels, weights.frequency,
                               panel_width(width - begin, lanes)};
      pass.kernels.transform_weights(s, pass.weight, begin, part);
    }
  });
  return weights;
}

// Few channels: blocks of tiles that stay in a core's cache from input to output.
inline void run_by_tiles(const WinogradPass& pass) {
  const WinogradShape& s = pass.shape;
  const int64_t width = pass.padded(s.out_channels), row = pass.padded(s.in_channels);
  const WinogradBuffer weight_buffer(pass.weight_floats(width));
  const PackedWeights weights = transform_weights(pass, weight_buffer.get());
  const int64_t tile_bytes = pass.frequencies() * (row + width) * 4;
  const int64_t tiles = s.num_tiles();
  // By sixes, the rows of the largest block of registers; every thread gets a block, if it can.
  const int64_t share = round_up(at::divup(tiles, at::get_num_threads()), 6);
  const int64_t size = std::min(std::max(kBlockBytes / tile_bytes / 6 * 6, kMinTiles), share);
  const int64_t blocks = at::divup(tiles, size);
  share_out(blocks, [&](SharedBlocks::Share& share) {
    const WinogradBuffer buffer(pass.spectrum_floats(size, row) + pass.spectrum_floats(size, width));
    const Spectrum input = pass.spectrum(buffer.get(), size, row);
    const Spectrum product =
        pass.spectrum(buffer.get() + pass.spectrum_floats(size, row), size, width);
    for (int64_t block; (block = share.next()) >= 0;) {
      const int64_t begin = block * size, end = std::min(begin + size, tiles);
      pass.kernels.transform_input(s, pass.x, begin, end, input, /*cached=*/false);
      pass.kernels.multiply(input, weights, product, end - begin, s.in_channels,
                            pass.outputs_of(begin, end), pass.added_of(begin, end));
      pass.kernels.transform_output(s, product, begin, end, 0, width, pass.bias, pass.added, pass.y);
    }
  });
}

// Lines of pixels of all images, one after another: line y of image n is n * height + y.
struct Lines {
  int64_t first, last;
};

// Blocks of whole rows of tiles, for operators that make the input of a convolution or read its
// output while it is in the cache. The blocks depend on the shape alone.
class RowBlocks {
 public:
  explicit RowBlocks(const WinogradPass& pass)
      : shape_(pass.shape), tile_(pass.kernels.tile), rows_(shape_.batch * shape_.tiles_y) {
    const int64_t channels = pass.padded(shape_.in_channels) + pass.padded(shape_.out_channels);
    const int64_t tiles = std::max(kBlockBytes / (pass.frequencies() * channels * 4), kMinTiles);
    // A fair share for some threads.
    rows_of_block_ = std::clamp<int64_t>(tiles / shape_.tiles_x, 1, at::divup(rows_, 16));
  }

  int64_t count() const { return at::divup(rows_, rows_of_block_); }
  int64_t largest() const { return rows_of_block_ * shape_.tiles_x; }
  int64_t begin(int64_t block) const { return row(block) * shape_.tiles_x; }

  // Lines of the input that a block reads.
  Lines read(int64_t block) const {
    const int64_t first = row(block), last = row(block + 1) - 1;
    const int64_t top = first % shape_.tiles_y * tile_ - shape_.pad_y;
    const int64_t bottom = last % shape_.tiles_y * tile_ - shape_.pad_y + tile_ + 2;
    return {line(first, top, shape_.height), line(last, bottom, shape_.height)};
  }
  // Every line of the input, once in all blocks.
  Lines own(int64_t block) const { return {cut(block, shape_.height), cut(block + 1, shape_.height)}; }
  // Lines of the output that a block writes.
  Lines written(int64_t block) const {
    return {cut(block, shape_.out_height), cut(block + 1, shape_.out_height)};
  }

 private:
  int64_t row(int64_t block) const { return std::min(block * rows_of_block_, rows_); }
  int64_t line(int64_t row, int64_t y, int64_t height) const {
    return row / shape_.tiles_y * height + std::clamp<int64_t>(y, 0, height);
  }
  int64_t cut(int64_t block, int64_t height) const {
    const int64_t first = row(block);
    return line(first, first % shape_.tiles_y * tile_, height);
  }

  const WinogradShape shape_;
  const int64_t tile_, rows_;
  int64_t rows_of_block_ = 1;
};

// As run_by_tiles, by rows of tiles. make_worker() is called by each thread and gives an object with
// input(block), the address that pass.x would have if its lines read(block) were there,
// kMakesInput, whether it has just made them, and done(block), called when the lines written(block)
// are.
template <class MakeWorker>
void run_by_rows(const WinogradPass& pass, const RowBlocks& blocks, const MakeWorker& make_worker) {
  const WinogradShape& s = pass.shape;
  const int64_t width = pass.padded(s.out_channels), row = pass.padded(s.in_channels);
  const WinogradBuffer weight_buffer(pass.weight_floats(width));
  const PackedWeights weights = transform_weights(pass, weight_buffer.get());
  const int64_t size = blocks.largest();
  share_out(blocks.count(), [&](SharedBlocks::Share& share) {
    const WinogradBuffer buffer(pass.spectrum_floats(size, row) + pass.spectrum_floats(size, width));
    const Spectrum input = pass.spectrum(buffer.get(), size, row);
    const Spectrum product =
        pass.spectrum(buffer.get() + pass.spectrum_floats(size, row), size, width);
    auto worker = make_worker();
    for (int64_t block; (block = share.next()) >= 0;) {
      const int64_t begin = blocks.begin(block), end = blocks.begin(block + 1);
      pass.kernels.transform_input(s, worker.input(block), begin, end, input, worker.kMakesInput);
      pass.kernels.multiply(input, weights, product, end - begin, s.in_channels,
                            pass.outputs_of(begin, end), pass.added_of(begin, end));
      pass.kernels.transform_output(s, product, begin, end, 0, width, pass.bias, pass.added, pass.y);
      worker.done(block);
    }
  });
}

// Many channels: the input of all tiles (or of as many as memory allows) is transformed first, then
// chunks of output channels go from weights to output.
inline void run_by_channels(const WinogradPass& pass) {
  const WinogradShape& s = pass.shape;
  const int64_t row = pass.padded(s.in_channels), width = pass.padded(s.out_channels);
  const int64_t tiles = s.num_tiles();
  const int64_t panel = 2 * pass.kernels.lanes;
  int64_t chunk = round_up(kChunkChannels, panel);
  while (chunk > panel && at::divup(width, chunk) < at::get_num_threads()) chunk /= 2;
  const int64_t tile_bytes = pass.frequencies() * std::max(row, chunk) * 4;
  const int64_t rounds = at::divup(tiles, std::max<int64_t>(kTilesBytes / tile_bytes, 6));
  const int64_t size = round_up(at::divup(tiles, rounds), 6);
  const WinogradBuffer buffer(pass.spectrum_floats(size, row));
  const Spectrum input = pass.spectrum(buffer.get(), size, row);
  for (int64_t begin = 0; begin < tiles; begin += size) {
    const int64_t end = std::min(begin + size, tiles);
    at::parallel_for(begin, end, 6, [&](int64_t first, int64_t last) {
      Spectrum part = input;
      part.data += (first - begin) * input.row;
      pass.kernels.transform_input(s, pass.x, first, last, part, /*cached=*/false);
    });
    share_out(at::divup(width, chunk), [&](SharedBlocks::Share& share) {
      const WinogradBuffer own(pass.weight_floats(chunk) + pass.spectrum_floats(size, chunk));
      const Spectrum product = pass.spectrum(own.get() + pass.weight_floats(chunk), size, chunk);
      for (int64_t block; (block = share.next()) >= 0;) {
        const int64_t c = block * chunk;
        const int64_t part = std::min(chunk, width - c);
        const PackedWeights weights = pass.weights(own.get(), part);
        pass.kernels.transform_weights(s, pass.weight, c, weights);
        pass.kernels.multiply(input, weights, product, end - begin, s.in_channels, {}, {});
        pass.kernels.transform_output(s, product, begin, end, c, part, pass.bias, pass.added, pass.y);
      }
    });
  }
}

// Whether the transformed weights are made once, so that blocks of tiles go from input to output.
inline bool runs_by_tiles(const WinogradPass& pass) {
  return pass.weight_floats(pass.padded(pass.shape.out_channels)) * 4 <= kWholeWeightBytes;
}

inline bool is_empty(const WinogradPass& pass) {
  return pass.shape.num_tiles() == 0 || pass.shape.out_channels == 0;
}

inline void run_winograd(const WinogradPass& pass) {
  if (is_empty(pass)) return;
  if (runs_by_tiles(pass)) {
    run_by_tiles(pass);
  } else {
    run_by_channels(pass);
  }
}

// A convolution, or the gradient for its input. height, width: of x. out_channels: of the result.
inline WinogradShape winograd_shape(const WinogradKernels& kernels, int64_t batch,
                                    int64_t in_channels, int64_t height, int64_t width,
                                    int64_t out_channels, int64_t pad_y, int64_t pad_x,
                                    bool reversed) {
  WinogradShape shape{};
  shape.batch = batch;
  shape.in_channels = in_channels;
  shape.height = height;
  shape.width = width;
  shape.out_channels = out_channels;
  shape.out_height = height + 2 * pad_y - 2;
  shape.out_width = width + 2 * pad_x - 2;
  shape.pad_y = pad_y;
  shape.pad_x = pad_x;
  shape.tiles_y = at::divup(shape.out_height, kernels.tile);
  shape.tiles_x = at::divup(shape.out_width, kernels.tile);
  shape.reversed = reversed;
  return shape;
}

}  // namespace pfs::cpu
