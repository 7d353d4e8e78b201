#include "kept_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace pfs::cpu {
namespace {

// Smaller blocks stay with the C library, which keeps them itself.
constexpr size_t kMinBytes = size_t{128} << 10;
// Sizes are rounded up to this, so that tensors of nearly the same size share blocks.
constexpr size_t kGrain = size_t{16} << 10;
// A free block may be larger than asked for by this part of it.
constexpr size_t kSlack = 4;
// From this size on the system is asked for huge pages: fewer traps and fewer misses of the table
// of addresses.
constexpr size_t kHugeBytes = size_t{4} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      data = take((bytes + kGrain - 1) / kGrain * kGrain);
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }

  void add_keeper() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (keepers_++ == 0) most_in_use_ = bytes_in_use_;
  }
  void remove_keeper() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--keepers_ == 0) release_free(0);
  }

  void add_user() { ++users_; }
  void remove_user() { --users_; }
  bool serves(size_t bytes) const { return bytes >= kMinBytes && users_ > 0; }

  KeptBytes bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(bytes_in_use_), static_cast<int64_t>(bytes_free_)};
  }

  // A process that is forked while another thread allocates must not inherit the lock.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void give_back(void* data);

  // The lock is held in all of these.
  void* take(size_t bytes) {
    void* data = nullptr;
    const auto found = free_.lower_bound(bytes);
    if (found != free_.end() && found->first <= bytes + bytes / kSlack) {
      bytes = found->first;
      data = found->second;
      bytes_free_ -= bytes;
      free_.erase(found);
    } else {
      const size_t most = std::max(most_in_use_, bytes_in_use_ + bytes);
      const size_t limit = most + most / 2;
      const size_t wanted = bytes_in_use_ + bytes;
      release_free(limit > wanted ? limit - wanted : 0);
      data = allocate_new(bytes);
    }
    in_use_.emplace(data, bytes);
    bytes_in_use_ += bytes;
    most_in_use_ = std::max(most_in_use_, bytes_in_use_);
    return data;
  }

  void* allocate_new(size_t bytes) {
    void* data = nullptr;
    try {
      data = c10::alloc_cpu(bytes);
    } catch (const c10::Error&) {
      if (bytes_free_ == 0) throw;
      release_free(0);
      data = c10::alloc_cpu(bytes);
    }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= kHugeBytes) {
      const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
      const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
      // Advice: where the system has no huge pages, nothing changes.
      if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
    return data;
  }

  // Largest first, down to `keep` bytes.
  void release_free(size_t keep) {
    while (bytes_free_ > keep) {
      const auto last = std::prev(free_.end());
      bytes_free_ -= last->first;
      c10::free_cpu(last->second);
      free_.erase(last);
    }
  }

  void return_block(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(data);
    const size_t bytes = found->second;
    in_use_.erase(found);
    bytes_in_use_ -= bytes;
    if (keepers_ > 0) {
      free_.emplace(bytes, data);
      bytes_free_ += bytes;
    } else {
      c10::free_cpu(data);
    }
  }

  std::mutex mutex_;
  int64_t keepers_ = 0;
  std::atomic<int64_t> users_{0};
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> in_use_;
  size_t bytes_free_ = 0, bytes_in_use_ = 0, most_in_use_ = 0;
};

// Never destroyed: tensors may be freed while the process ends.
Pool& pool() {
  static Pool* const only = [] {
    auto* made = new Pool;
#if defined(__linux__)
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
#endif
    return made;
  }();
  return *only;
}

void Pool::give_back(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  pool().return_block(data);
}

}  // namespace

KeptMemory::KeptMemory() { pool().add_keeper(); }

KeptMemory::~KeptMemory() {
  while (entered_ > 0) exit();
  pool().remove_keeper();
}

void KeptMemory::enter() {
  pool().add_user();
  ++entered_;
}

void KeptMemory::exit() {
  TORCH_CHECK(entered_ > 0,
              "KeptMemory: exit must follow an enter, got none; use it in a with block");
  --entered_;
  pool().remove_user();
}

KeptBytes kept_bytes() { return pool().bytes(); }

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (!pool().serves(bytes)) {
    return at::empty(sizes, at::TensorOptions(dtype).memory_format(format));
  }
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(sizes, &pool(), keys, dtype, format));
}

c10::DataPtr allocate(size_t bytes) {
  c10::Allocator* from = &pool();
  return (pool().serves(bytes) ? from : c10::GetCPUAllocator())->allocate(bytes);
}

}  // namespace pfs::cpu
