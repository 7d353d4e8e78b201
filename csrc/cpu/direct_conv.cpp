// A row of outputs is a sum of matrix products, one for each row of taps: the taps of one row meet
// pixels that follow each other in memory, so that the inputs of neighbouring outputs are rows of a
// matrix that overlap. The gradient for the input is the same with strides exchanged: one such
// convolution for each position of a pixel within the stride, over the taps that reach it.
#include "direct_conv.h"

#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "kept_memory.h"
#include "shared_blocks.h"

namespace pfs::cpu {
namespace {

// Packed weights are read again for every row of outputs: they must stay in a second-level cache.
constexpr int64_t kMaxWeightBytes = int64_t{256} << 10;
// From this many input channels on, oneDNN is as fast at stride 1.
constexpr int64_t kFewChannels = 8;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Largest whole number that is not above a / b; b > 0.
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Outputs x = first, first + step, ... of a row: output number j reads `taps` pixels from
// from + j * advance on, which may lie outside of the image.
struct Phase {
  int64_t first, count;
  int64_t from, taps;
  int64_t first_tap, tap_step;  // tap t of the product is column first_tap + t * tap_step
};

struct Shape {
  int64_t batch;
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
};

struct Taps {
  int64_t rows, columns;  // of the kernel
  int64_t stride_y, stride_x, pad_y, pad_x;
  bool transposed;
};

std::vector<Phase> make_phases(const Shape& s, const Taps& taps) {
  if (!taps.transposed) return {{0, s.out_width, -taps.pad_x, taps.columns, 0, 1}};
  std::vector<Phase> phases;
  for (int64_t at = 0; at < std::min(taps.stride_x, s.out_width); ++at) {
    Phase phase{at, (s.out_width - at + taps.stride_x - 1) / taps.stride_x, 0, 0, 0,
                -taps.stride_x};
    for (int64_t column = taps.columns - 1; column >= 0; --column) {
      const int64_t distance = at + taps.pad_x - column;
      if (distance - floor_div(distance, taps.stride_x) * taps.stride_x != 0) continue;
      if (phase.taps++ == 0) {
        phase.first_tap = column;
        phase.from = floor_div(distance, taps.stride_x);
      }
    }
    phases.push_back(phase);
  }
  return phases;
}

class Convolution {
 public:
  Convolution(const Shape& shape, const Taps& taps)
      : s_(shape), taps_(taps), kernels_(*chosen_isa().gemm), phases_(make_phases(shape, taps)) {
    width_ = round_up(s_.out_channels, kernels_.lanes);
    // The last vector of channels is one that ends with the last channel, so that none reaches beyond.
    back_ = s_.out_channels < kernels_.lanes ? 0 : width_ - s_.out_channels;
    advance_ = taps.transposed ? 1 : taps.stride_x;
    step_ = taps.transposed ? taps.stride_x : 1;
    for (const Phase& phase : phases_) {
      left_ = std::max(left_, -phase.from);
      const int64_t end = phase.from + (phase.count - 1) * advance_ + phase.taps;
      right_ = std::max(right_, end - s_.in_width);
      per_row_ += phase.taps * s_.in_channels * width_;
    }
  }

  // weight: dense [C_out, rows, columns, C_in] of the forward convolution.
  void run(const float* x, const float* weight, const float* bias, float* y) const {
    const c10::DataPtr packed_memory =
        allocate(static_cast<size_t>(taps_.rows * per_row_) * sizeof(float));
    auto* packed = static_cast<float*>(packed_memory.get());
    for (int64_t row = 0; row < taps_.rows; ++row) pack(weight, row, packed + row * per_row_);

    const int64_t lines = s_.batch * s_.out_height;
    // Neighbouring lines share rows of the input.
    const int64_t size = std::max<int64_t>(1, kOutputs / std::max<int64_t>(1, s_.out_width * width_));
    share_out(at::divup(lines, size), [&](SharedBlocks::Share& share) {
      Worker worker(*this, x, packed, bias, y);
      for (int64_t block; (block = share.next()) >= 0;) {
        const int64_t last = std::min((block + 1) * size, lines);
        for (int64_t line = block * size; line < last; ++line) worker.run(line);
      }
    });
  }

 private:
  // Of a block of lines: what is worth a thread's start.
  static constexpr int64_t kOutputs = 16 * 1024;

  void pack(const float* weight, int64_t row, float* packed) const {
    const int64_t outputs = s_.out_channels, inputs = s_.in_channels;
    // Of the forward convolution, whose channels are exchanged in the gradient.
    const int64_t depth = taps_.transposed ? outputs : inputs;
    for (const Phase& phase : phases_) {
      for (int64_t panel = 0, columns; panel < width_; panel += columns) {
        columns = panel_width(width_ - panel, kernels_.lanes);
        for (int64_t t = 0; t < phase.taps; ++t) {
          const int64_t column = phase.first_tap + t * phase.tap_step;
          for (int64_t in = 0; in < inputs; ++in) {
            for (int64_t c = 0; c < columns; ++c) {
              const bool last = panel + c >= width_ - kernels_.lanes;
              const int64_t out = panel + c - (last ? back_ : 0);
              const int64_t a = taps_.transposed ? in : out, b = taps_.transposed ? out : in;
              const int64_t at = ((a * taps_.rows + row) * taps_.columns + column) * depth + b;
              *packed++ = out < outputs ? weight[at] : 0.0f;
            }
          }
        }
      }
    }
  }

  // One thread's rows of outputs, one after another.
  class Worker {
   public:
    Worker(const Convolution& conv, const float* x, const float* packed, const float* bias,
           float* y)
        : conv_(conv), x_(x), packed_(packed), bias_(bias), y_(y) {
      const Shape& s = conv.s_;
      pads_ = conv.left_ > 0 || conv.right_ > 0;
      slot_ = (conv.left_ + s.in_width + std::max<int64_t>(conv.right_, 0)) * s.in_channels;
      if (pads_) {
        padded_.assign(conv.taps_.rows * slot_, 0.0f);
        held_.assign(conv.taps_.rows, -1);
      }
      if (s.out_channels < conv.kernels_.lanes) {
        int64_t most = 0;
        for (const Phase& phase : conv.phases_) most = std::max(most, phase.count);
        sums_.resize(most * conv.width_);
        if (bias != nullptr) padded_bias_.assign(bias, bias + s.out_channels);
        padded_bias_.resize(conv.width_);
      }
      products_.resize(conv.taps_.rows);
    }

    void run(int64_t line) {
      const Shape& s = conv_.s_;
      const int64_t image = line / s.out_height, row = line % s.out_height;
      float* out = y_ + line * s.out_width * s.out_channels;
      for (size_t i = 0; i < conv_.phases_.size(); ++i) run_phase(image, row, i, out);
    }

   private:
    void run_phase(int64_t image, int64_t row, size_t index, float* out) {
      const Shape& s = conv_.s_;
      const Phase& phase = conv_.phases_[index];
      float* to = out + phase.first * s.out_channels;
      const int64_t to_row = conv_.step_ * s.out_channels;
      const bool whole = sums_.empty();
      float* c = whole ? to : sums_.data();
      const float* bias = whole || bias_ == nullptr ? bias_ : padded_bias_.data();
      int64_t before = 0;
      for (size_t p = 0; p < index; ++p) before += conv_.phases_[p].taps;
      int64_t count = 0;
      for (int64_t tap = 0; phase.taps > 0 && tap < conv_.taps_.rows; ++tap) {
        const int64_t in_row = conv_.input_row(row, tap);
        if (in_row < 0) continue;
        products_[count++] = {
            line_of(image, in_row) + phase.from * s.in_channels,
            packed_ + tap * conv_.per_row_ + before * s.in_channels * conv_.width_};
      }
      conv_.kernels_.multiply(products_.data(), count, conv_.advance_ * s.in_channels,
                              phase.taps * s.in_channels, bias, c, whole ? to_row : conv_.width_,
                              phase.count, conv_.width_, conv_.back_);
      for (int64_t j = 0; !whole && j < phase.count; ++j) {
        std::memcpy(to + j * to_row, c + j * conv_.width_, s.out_channels * sizeof(float));
      }
    }

    // The first pixel of an input row, with zeros around it where the products read them.
    const float* line_of(int64_t image, int64_t row) {
      const Shape& s = conv_.s_;
      const int64_t line = image * s.in_height + row;
      const float* from = x_ + line * s.in_width * s.in_channels;
      if (!pads_) return from;
      const int64_t slot = row % conv_.taps_.rows;
      float* to = padded_.data() + slot * slot_ + conv_.left_ * s.in_channels;
      if (held_[slot] != line) {
        std::memcpy(to, from, s.in_width * s.in_channels * sizeof(float));
        held_[slot] = line;
      }
      return to;
    }

    const Convolution& conv_;
    const float* x_;
    const float* packed_;
    const float* bias_;
    float* y_;
    bool pads_ = false;
    int64_t slot_ = 0;
    std::vector<float> padded_;  // rows of the kernel, one input row each
    std::vector<int64_t> held_;  // which line each of them holds
    std::vector<Product> products_;
    std::vector<float> sums_, padded_bias_;  // where there are fewer channels than a vector has
  };

  // The input row that a row of taps meets for an output row; -1 where there is none.
  int64_t input_row(int64_t row, int64_t tap) const {
    if (!taps_.transposed) {
      const int64_t at = row * taps_.stride_y - taps_.pad_y + tap;
      return at < s_.in_height ? std::max<int64_t>(at, -1) : -1;
    }
    const int64_t distance = row + taps_.pad_y - tap;
    if (distance < 0 || distance % taps_.stride_y != 0) return -1;
    return distance / taps_.stride_y < s_.in_height ? distance / taps_.stride_y : -1;
  }

  const Shape s_;
  const Taps taps_;
  const GemmKernels& kernels_;
  const std::vector<Phase> phases_;
  int64_t width_ = 0, back_ = 0, advance_ = 1, step_ = 1;
  int64_t left_ = 0, right_ = 0;  // pixels that are read outside of a row
  int64_t per_row_ = 0;           // packed floats of a row of taps
};

at::Tensor channels_last(const at::Tensor& t) {
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}

Taps taps_of(const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
             bool transposed) {
  return {weight.size(2), weight.size(3), stride[0], stride[1],
          padding[0],     padding[1],     transposed};
}

}  // namespace

bool direct_conv_pays(at::IntArrayRef weight_size, at::IntArrayRef stride,
                      at::IntArrayRef dilation, int64_t groups) {
  if (weight_size.size() != 4 || groups != 1 || dilation[0] != 1 || dilation[1] != 1) return false;
  const bool strided = stride[0] > 1 || stride[1] > 1;
  const bool pointwise = weight_size[2] == 1 && weight_size[3] == 1;
  const int64_t values = c10::multiply_integers(weight_size);
  return values > 0 && values * static_cast<int64_t>(sizeof(float)) <= kMaxWeightBytes &&
         (strided || pointwise || weight_size[1] < kFewChannels);
}

bool direct_conv_serves(const at::Tensor& image, const at::Tensor& weight, at::IntArrayRef stride,
                        at::IntArrayRef dilation, int64_t groups) {
  return image.dim() == 4 && image.scalar_type() == at::kFloat && image.is_cpu() &&
         image.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
         direct_conv_pays(weight.sizes(), stride, dilation, groups);
}

at::Tensor direct_conv(const at::Tensor& x_in, const at::Tensor& weight_in,
                       const OptionalTensor& bias_in, at::IntArrayRef stride,
                       at::IntArrayRef padding) {
  const at::Tensor x = channels_last(x_in), weight = channels_last(weight_in);
  const Taps taps = taps_of(weight, stride, padding, /*transposed=*/false);
  const Shape shape{x.size(0),
                    x.size(1),
                    x.size(2),
                    x.size(3),
                    weight.size(0),
                    (x.size(2) + 2 * taps.pad_y - taps.rows) / taps.stride_y + 1,
                    (x.size(3) + 2 * taps.pad_x - taps.columns) / taps.stride_x + 1};
  const at::Tensor y =
      empty({shape.batch, shape.out_channels, shape.out_height, shape.out_width}, at::kFloat,
            at::MemoryFormat::ChannelsLast);
  at::Tensor bias;
  if (bias_in.has_value() && bias_in->defined()) bias = bias_in->contiguous();
  Convolution(shape, taps)
      .run(x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
           bias.defined() ? bias.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>());
  return y;
}

at::Tensor direct_conv_backward(const at::Tensor& grad_y_in, const at::Tensor& weight_in,
                                at::IntArrayRef input_size, at::IntArrayRef stride,
                                at::IntArrayRef padding) {
  const at::Tensor grad_y = channels_last(grad_y_in), weight = channels_last(weight_in);
  const Taps taps = taps_of(weight, stride, padding, /*transposed=*/true);
  const Shape shape{grad_y.size(0),  grad_y.size(1), grad_y.size(2), grad_y.size(3),
                    input_size[1],   input_size[2],  input_size[3]};
  const at::Tensor grad_x = empty(input_size, at::kFloat, at::MemoryFormat::ChannelsLast);
  Convolution(shape, taps)
      .run(grad_y.const_data_ptr<float>(), weight.const_data_ptr<float>(), nullptr,
           grad_x.mutable_data_ptr<float>());
  return grad_x;
}

}  // namespace pfs::cpu
