// The blocks of one loop, shared out among threads: each begins with an equal run of them and, once
// that is done, takes blocks that others have not begun. Where another process has a core for a
// while, nobody waits for the thread that was on it.
//
// Which thread runs a block says nothing about the result: callers write what belongs to a block to
// its own place, and merge in the order of the blocks.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace pfs::cpu {

class SharedBlocks {
 public:
  SharedBlocks(int64_t count, int64_t runs)
      : count_(count), runs_(runs), taken_(std::make_unique<Counter[]>(runs)) {}

  // The blocks of one thread, which begins with the run of its number.
  class Share {
   public:
    Share(SharedBlocks& blocks, int64_t first_run) : blocks_(blocks), run_(first_run) {}

    // The next block, or -1 when all are taken.
    int64_t next() {
      for (; tried_ < blocks_.runs_; ++tried_, run_ = (run_ + 1) % blocks_.runs_) {
        const int64_t block = blocks_.begin(run_) + blocks_.taken_[run_].value.fetch_add(1);
        if (block < blocks_.begin(run_ + 1)) return block;
      }
      return -1;
    }
    // The same from the end of each run to its beginning.
    int64_t next_backwards() {
      const int64_t block = next();
      return block < 0 ? -1 : blocks_.begin(run_) + blocks_.begin(run_ + 1) - 1 - block;
    }

   private:
    SharedBlocks& blocks_;
    int64_t run_, tried_ = 0;
  };

 private:
  // Of a cache line each, so that threads at their own runs do not exchange it.
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  int64_t begin(int64_t run) const { return count_ * run / runs_; }

  const int64_t count_, runs_;
  std::unique_ptr<Counter[]> taken_;
};

// Calls work(share) in each thread; between them the shares have all of [0, count).
template <class Work>
void share_out(int64_t count, const Work& work) {
  if (count <= 0) return;
  const int64_t runs = std::min<int64_t>(count, at::get_num_threads());
  SharedBlocks blocks(count, runs);
  at::parallel_for(0, runs, 1, [&](int64_t first, int64_t) {
    SharedBlocks::Share share(blocks, first);
    work(share);
  });
}

}  // namespace pfs::cpu
