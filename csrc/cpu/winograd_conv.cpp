// 3x3 convolutions of stride 1 by Winograd's minimal filtering: checks, blocking, threads. The
// arithmetic is in winograd_kernel_impl.h.
//
// Weights are transformed in every call: for most layers that is less than 3 % of it, and the
// transformed ones, up to 4 times as large as the weights, need no memory between calls and never go
// stale.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../pfs_ops.h"
#include "isa.h"
#include "kept_memory.h"

namespace pfs {
namespace {

using cpu::PackedWeights;
using cpu::Spectrum;
using cpu::WinogradKernels;
using cpu::WinogradShape;

// Transformed weights up to this size are made once, and each thread takes blocks of tiles from
// input to output; larger ones are made by chunks of output channels, which the threads share out.
constexpr int64_t kWholeWeightBytes = int64_t{4} << 20;
// What a block of tiles may take, transformed: most of a second-level cache of 512 KiB ...
constexpr int64_t kBlockBytes = 440 << 10;
// ... but not so few tiles that reading the weights again for each block takes longer than that.
constexpr int64_t kMinTiles = 12;
// Transformed input of all tiles that are worked on at once, where weights come by chunks; and of
// their products, for each thread.
constexpr int64_t kTilesBytes = int64_t{24} << 20;
constexpr int64_t kChunkChannels = 64;
// Rows of all frequencies at multiples of a power of two would share few sets of a cache.
constexpr int64_t kSkew = 16;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(cpu::allocate(static_cast<size_t>(floats) * sizeof(float))) {}
  float* get() const { return static_cast<float*>(data_.get()); }

 private:
  c10::DataPtr data_;
};

// One call: the shape, the kernels, and where the tensors are.
struct Pass {
  const WinogradKernels& kernels;
  WinogradShape shape;
  const float* x;
  const float* weight;
  const float* bias;
  float* y;

  int64_t frequencies() const { return (kernels.tile + 2) * (kernels.tile + 2); }
  int64_t padded(int64_t channels) const { return round_up(channels, kernels.lanes); }

  // First pixel of the row of tiles that a tile is in: what lies between two of them is about the
  // memory of the tiles between.
  int64_t first_row(int64_t tile, int64_t height) const {
    const int64_t line = tile / shape.tiles_x;
    const int64_t row = std::min(line % shape.tiles_y * kernels.tile, height);
    return line / shape.tiles_y * height + row;
  }
  const float* input_of(int64_t tile) const {
    return x + first_row(tile, shape.height) * shape.width * shape.in_channels;
  }
  const float* output_of(int64_t tile) const {
    return y + first_row(tile, shape.out_height) * shape.out_width * shape.out_channels;
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

// Few channels: blocks of tiles that stay in a core's cache from input to output.
void run_by_tiles(const Pass& pass) {
  const WinogradShape& s = pass.shape;
  const int64_t width = pass.padded(s.out_channels), row = pass.padded(s.in_channels);
  const Buffer weight_buffer(pass.weight_floats(width));
  const PackedWeights weights = pass.weights(weight_buffer.get(), width);
  const int64_t lanes = pass.kernels.lanes;
  // By panels of two vectors; every panel begins at first * depth floats.
  at::parallel_for(0, at::divup(width, 2 * lanes), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = panel * 2 * lanes;
      const PackedWeights part{weights.data + begin * s.in_channels, weights.frequency,
                               std::min(width - begin, 2 * lanes)};
      pass.kernels.transform_weights(s, pass.weight, begin, part);
    }
  });
  const int64_t tile_bytes = pass.frequencies() * (row + width) * 4;
  const int64_t tiles = s.num_tiles();
  // By sixes, the rows of the largest block of registers; every thread gets a block, if it can.
  const int64_t share = round_up(at::divup(tiles, at::get_num_threads()), 6);
  const int64_t size = std::min(std::max(kBlockBytes / tile_bytes / 6 * 6, kMinTiles), share);
  const int64_t blocks = at::divup(tiles, size);
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const Buffer buffer(pass.spectrum_floats(size, row) + pass.spectrum_floats(size, width));
    const Spectrum input = pass.spectrum(buffer.get(), size, row);
    const Spectrum product =
        pass.spectrum(buffer.get() + pass.spectrum_floats(size, row), size, width);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * size, end = std::min(begin + size, tiles);
      pass.kernels.transform_input(s, pass.x, begin, end, input);
      const int64_t after = std::min(end + size, tiles);
      pass.kernels.multiply(input, weights, product, end - begin, s.in_channels,
                            {pass.output_of(begin), pass.output_of(end)},
                            {pass.input_of(end), pass.input_of(after)});
      pass.kernels.transform_output(s, product, begin, end, 0, width, pass.bias, pass.y);
    }
  });
}

// Many channels: the input of all tiles (or of as many as memory allows) is transformed first, then
// chunks of output channels go from weights to output.
void run_by_channels(const Pass& pass) {
  const WinogradShape& s = pass.shape;
  const int64_t row = pass.padded(s.in_channels), width = pass.padded(s.out_channels);
  const int64_t tiles = s.num_tiles();
  const int64_t panel = 2 * pass.kernels.lanes;
  int64_t chunk = round_up(kChunkChannels, panel);
  while (chunk > panel && at::divup(width, chunk) < at::get_num_threads()) chunk /= 2;
  const int64_t tile_bytes = pass.frequencies() * std::max(row, chunk) * 4;
  const int64_t rounds = at::divup(tiles, std::max<int64_t>(kTilesBytes / tile_bytes, 6));
  const int64_t size = round_up(at::divup(tiles, rounds), 6);
  const Buffer buffer(pass.spectrum_floats(size, row));
  const Spectrum input = pass.spectrum(buffer.get(), size, row);
  for (int64_t begin = 0; begin < tiles; begin += size) {
    const int64_t end = std::min(begin + size, tiles);
    at::parallel_for(begin, end, 6, [&](int64_t first, int64_t last) {
      Spectrum part = input;
      part.data += (first - begin) * input.row;
      pass.kernels.transform_input(s, pass.x, first, last, part);
    });
    at::parallel_for(0, at::divup(width, chunk), 1, [&](int64_t first, int64_t last) {
      const Buffer own(pass.weight_floats(chunk) + pass.spectrum_floats(size, chunk));
      const Spectrum product = pass.spectrum(own.get() + pass.weight_floats(chunk), size, chunk);
      for (int64_t c = first * chunk; c < std::min(last * chunk, width); c += chunk) {
        const int64_t part = std::min(chunk, width - c);
        const PackedWeights weights = pass.weights(own.get(), part);
        pass.kernels.transform_weights(s, pass.weight, c, weights);
        pass.kernels.multiply(input, weights, product, end - begin, s.in_channels, {}, {});
        pass.kernels.transform_output(s, product, begin, end, c, part, pass.bias, pass.y);
      }
    });
  }
}

void run(const Pass& pass) {
  if (pass.shape.num_tiles() == 0 || pass.shape.out_channels == 0) return;
  const int64_t weight_bytes = pass.weight_floats(pass.padded(pass.shape.out_channels)) * 4;
  if (weight_bytes <= kWholeWeightBytes) {
    run_by_tiles(pass);
  } else {
    run_by_channels(pass);
  }
}

const WinogradKernels& kernels_for(const char* op, int64_t tile) {
  TORCH_CHECK_VALUE(tile == 2 || tile == 4, op, ": tile must be 2 or 4, got ", tile,
                    "; frozen_conv convolves directly");
  return cpu::chosen_isa().winograd[tile / 2 - 1];
}

void check_image(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 4, op, ": ", name,
                    " must have 4 dimensions [N, C, H, W], got shape ", t.sizes(),
                    "; use frozen_conv for others");
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                   t.scalar_type(), "; use frozen_conv for other dtypes");
}

void check_weight(const char* op, const at::Tensor& weight, const char* x_name, const at::Tensor& x,
                  int64_t channel_dim, at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
                    ": weight must have shape [C_out, C_in, 3, 3], got ", weight.sizes(),
                    "; use frozen_conv for other kernels");
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, op, ": weight must be float32, got ",
                   weight.scalar_type(), "; use frozen_conv for other dtypes");
  TORCH_CHECK_VALUE(x.size(1) == weight.size(channel_dim), op, ": ", x_name, " must have ",
                    weight.size(channel_dim), " channels (weight.size(", channel_dim, ")), got ",
                    x.size(1), "; weight and ", x_name, " do not belong together");
  checks::check_same_device(op, "weight", weight, x, x_name);
  TORCH_CHECK_VALUE(padding.size() == 2, op, ": padding must have two values, got ", padding,
                    "; pass one for each spatial dimension");
  for (const int64_t value : padding) {
    TORCH_CHECK_VALUE(value >= 0 && value <= 2, op, ": padding must lie in [0, 2], got ", padding,
                      "; use frozen_conv for more");
  }
}

at::Tensor channels_last(const at::Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

// x [N, C_in, H, W] -> [N, C_out, H + 2 pad_y - 2, W + 2 pad_x - 2], in the layout of x. weight:
// [C_out, C_in, 3, 3], or [C_in, C_out, 3, 3] if reversed.
at::Tensor convolve(const WinogradKernels& kernels, const at::Tensor& x_in,
                    const at::Tensor& weight_in, const float* bias, int64_t pad_y, int64_t pad_x,
                    bool reversed) {
  const at::Tensor x = channels_last(x_in), weight = channels_last(weight_in);
  WinogradShape shape{};
  shape.batch = x.size(0);
  shape.in_channels = x.size(1);
  shape.height = x.size(2);
  shape.width = x.size(3);
  shape.out_channels = weight.size(reversed ? 1 : 0);
  shape.out_height = shape.height + 2 * pad_y - 2;
  shape.out_width = shape.width + 2 * pad_x - 2;
  shape.pad_y = pad_y;
  shape.pad_x = pad_x;
  shape.tiles_y = at::divup(shape.out_height, kernels.tile);
  shape.tiles_x = at::divup(shape.out_width, kernels.tile);
  shape.reversed = reversed;
  const at::Tensor y =
      cpu::empty({shape.batch, shape.out_channels, shape.out_height, shape.out_width}, at::kFloat,
                 at::MemoryFormat::ChannelsLast);
  run({kernels, shape, x.const_data_ptr<float>(), weight.const_data_ptr<float>(), bias,
       y.mutable_data_ptr<float>()});
  return y.contiguous(x_in.suggest_memory_format());
}

}  // namespace

at::Tensor winograd_conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         at::IntArrayRef padding, int64_t tile) {
  constexpr const char* op = "winograd_conv";
  check_image(op, "x", x);
  check_weight(op, weight, "x", x, 1, padding);
  const WinogradKernels& kernels = kernels_for(op, tile);
  for (int64_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(x.size(d + 2) + 2 * padding[d] >= 3, op,
                      ": x must be at least 3 high and wide with its padding, got shape ",
                      x.sizes(), " and padding ", padding, "; pad it");
  }
  at::Tensor dense_bias;
  if (checks::is_present(bias)) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op,
                      ": bias must have shape [C_out] with C_out = ", weight.size(0),
                      " (weight.size(0)), got ", bias->sizes(),
                      "; pass one value per output channel");
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat, op, ": bias must be float32, got ",
                     bias->scalar_type(), "; cast the frozen bias once");
    checks::check_same_device(op, "bias", *bias, x);
    dense_bias = bias->contiguous();
  }
  return convolve(kernels, x, weight,
                  dense_bias.defined() ? dense_bias.const_data_ptr<float>() : nullptr, padding[0],
                  padding[1], /*reversed=*/false);
}

at::Tensor winograd_conv_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                  at::IntArrayRef padding, int64_t tile) {
  constexpr const char* op = "_winograd_conv_backward";
  check_image(op, "grad_y", grad_y);
  check_weight(op, weight, "grad_y", grad_y, 0, padding);
  for (int64_t d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(grad_y.size(d + 2) + 2 >= 2 * padding[d], op,
                      ": grad_y must be as large as the output for this padding, ", padding,
                      ", got shape ", grad_y.sizes(),
                      "; pass the gradient of winograd_conv's output");
  }
  return convolve(kernels_for(op, tile), grad_y, weight, nullptr, 2 - padding[0], 2 - padding[1],
                  /*reversed=*/true);
}

}  // namespace pfs

TORCH_LIBRARY_IMPL(pfs_fast, CPU, m) {
  m.impl("winograd_conv", &pfs::winograd_conv);
  m.impl("_winograd_conv_backward", &pfs::winograd_conv_backward);
}
