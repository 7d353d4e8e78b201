// The CUDA kernels of max_pool on the host, against loops over every window. Needs neither a GPU
// nor ATen.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

// clang-format off: the emulation comes first, it replaces what the kernels would include.
#include "cuda_emulation.h"
#include "expect.h"
#include "../../csrc/cuda/max_pool.cuh"
// clang-format on

namespace {

using namespace pfs;
using namespace pfs::cuda;

PoolShape make_shape(int64_t batch, int64_t channels, int64_t height, int64_t width,
                     int64_t kernel_y, int64_t kernel_x, int64_t stride_y, int64_t stride_x,
                     int64_t pad_y, int64_t pad_x) {
  return {batch,
          channels,
          height,
          width,
          (height + 2 * pad_y - kernel_y) / stride_y + 1,
          (width + 2 * pad_x - kernel_x) / stride_x + 1,
          kernel_y,
          kernel_x,
          stride_y,
          stride_x,
          pad_y,
          pad_x};
}

// Few different values, so that most windows have ties; some NaN.
template <typename T>
std::vector<T> draw(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> pick(-3, 3);
  std::vector<T> values(size);
  for (T& v : values) v = static_cast<T>(static_cast<float>(pick(generator)));
  for (int64_t i = 5; i < size; i += 31) values[i] = std::numeric_limits<T>::quiet_NaN();
  return values;
}

template <typename T>
bool same(T a, T b) {
  const double x = static_cast<double>(a), y = static_cast<double>(b);
  return x == y || (std::isnan(x) && std::isnan(y));
}

template <typename T>
struct Result {
  std::vector<T> y, grad_x;
};

template <typename T>
Result<T> by_loops(const PoolShape& s, const std::vector<T>& x, const std::vector<T>& grad_y) {
  Result<T> r;
  std::vector<double> sums(x.size(), 0.0);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t i = 0; i < s.out_height; ++i)
      for (int64_t j = 0; j < s.out_width; ++j)
        for (int64_t c = 0; c < s.channels; ++c) {
          int64_t best = -1;
          for (int64_t k = 0; k < s.kernel_y * s.kernel_x; ++k) {
            const int64_t row = i * s.stride_y - s.pad_y + k / s.kernel_x;
            const int64_t column = j * s.stride_x - s.pad_x + k % s.kernel_x;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            const int64_t at = ((n * s.height + row) * s.width + column) * s.channels + c;
            const double value = static_cast<double>(x[at]);
            if (best < 0 || value > static_cast<double>(x[best]) || std::isnan(value)) best = at;
          }
          sums[best] += static_cast<double>(grad_y[r.y.size()]);
          r.y.push_back(x[best]);
        }
  for (const double sum : sums) r.grad_x.push_back(static_cast<T>(sum));
  return r;
}

template <typename T, int V, typename Index>
void test_kernels(const PoolShape& s) {
  const int64_t in = s.batch * s.height * s.width * s.channels;
  const int64_t out = s.batch * s.out_height * s.out_width * s.channels;
  const std::vector<T> x = draw<T>(in, 1);
  std::vector<T> grad_y = draw<T>(out, 2);
  for (T& g : grad_y)
    g = same(g, g) && !std::isnan(static_cast<double>(g)) ? g : static_cast<T>(1.0f);
  const Result<T> expected = by_loops(s, x, grad_y);
  for (const bool reversed : {false, true}) {
    pfs_emulation::reverse_order = reversed;
    const DeviceScope scope(0);
    Result<T> r{std::vector<T>(out), std::vector<T>(in)};
    std::vector<uint8_t> offsets(out, 255);
    const auto blocks = [](int64_t threads) { return (threads + kMaxThreads - 1) / kMaxThreads; };
    launch(scope, max_pool_kernel<T, V, Index>, blocks(out / V), 1, kMaxThreads, x.data(), s,
           static_cast<Index>(out / V), r.y.data(), offsets.data());
    launch(scope, max_pool_backward_kernel<T, V, Index>, blocks(in / V), 1, kMaxThreads,
           grad_y.data(), offsets.data(), s, static_cast<Index>(in / V), r.grad_x.data());
    bool right_y = true, right_grad = true;
    for (int64_t i = 0; i < out; ++i) right_y &= same(r.y[i], expected.y[i]);
    for (int64_t i = 0; i < in; ++i) right_grad &= same(r.grad_x[i], expected.grad_x[i]);
    const std::string name = std::to_string(s.channels) + " channels, " + std::to_string(s.height) +
                             " x " + std::to_string(s.width) + ", window " +
                             std::to_string(s.kernel_y) + " x " + std::to_string(s.kernel_x) +
                             ", stride " + std::to_string(s.stride_y) + ", V " + std::to_string(V);
    expect(right_y, "y: " + name);
    expect(right_grad, "grad_x: " + name);
  }
}

}  // namespace

int main() {
  const PoolShape shapes[] = {
      make_shape(2, 16, 8, 8, 2, 2, 2, 2, 0, 0),   make_shape(2, 8, 7, 9, 3, 3, 2, 2, 1, 1),
      make_shape(3, 24, 5, 4, 3, 3, 1, 1, 1, 1),   make_shape(2, 8, 6, 7, 3, 2, 1, 3, 1, 0),
      make_shape(1, 8, 11, 6, 2, 2, 5, 5, 0, 0),   make_shape(4, 8, 1, 1, 3, 3, 2, 2, 1, 1),
      make_shape(1, 8, 20, 20, 15, 17, 3, 2, 7, 8)};
  for (PoolShape s : shapes) {
    test_kernels<float, 4, uint32_t>(s);
    test_kernels<c10::BFloat16, 8, uint32_t>(s);
    test_kernels<c10::Half, 8, int64_t>(s);
    test_kernels<double, 1, uint32_t>(s);
    s.batch *= s.channels;  // contiguous images
    s.channels = 1;
    test_kernels<float, 1, int64_t>(s);
    test_kernels<c10::BFloat16, 1, uint32_t>(s);
  }
  std::printf(num_failures == 0 ? "ok\n" : "%d checks failed\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
