// Memory of large outputs, kept for the next ones when a tensor lets go of it.
//
// The kernel clears a fresh page at its first touch, which takes longer than batch norm does, and a training step asks for the
// sizes of the step before. What lies idle for longer is lent to the kernel: it may take its pages at any time, without asking, and
// puts fresh ones in their place; so idle memory is never what a machine runs out of.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

class Recycler {
 public:
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    bool lent = false;
  };

  static Recycler& only() {
    static Recycler* found = new Recycler;  // never destroyed: tensors may outlive static objects
    return *found;
  }

  // A block of at least as many bytes, aligned to a huge page; data is null where malloc does as well, or where there is none.
  Block take(size_t bytes) {
    if (bytes < smallest || most_idle_ == 0) return {};
    const size_t size = (bytes + huge - 1) / huge * huge, largest = size + size / 4;
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      for (size_t i = idle_.size(); i-- > 0;) {  // the last that came lies in the cache
        const Block found = idle_[i];
        if (found.size < size || found.size > largest) continue;
        idle_.erase(idle_.begin() + ptrdiff_t(i));
        return found;
      }
    }
    return mapped(size);
  }

  void give(void* data, size_t size) {
    // A process forked while another thread held the lock never gets it: that costs it the reuse, no more.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return void(munmap(data, size));
    idle_.push_back({data, size});
    size_t since = 0;  // bytes that have come since, and its own
    for (size_t i = idle_.size(); i-- > 0;) {
      since += idle_[i].size;
      if (since <= most_kept && since <= most_idle_) continue;
      if (since <= most_idle_ && (idle_[i].lent || lend(idle_[i]))) {
        idle_[i].lent = true;
        continue;
      }
      munmap(idle_[i].data, idle_[i].size);
      idle_.erase(idle_.begin() + ptrdiff_t(i));
    }
  }

 private:
  static constexpr size_t smallest = 1 << 20;     // bytes; malloc keeps what is smaller
  static constexpr size_t huge = 2 << 20;         // a page of the large kind
  static constexpr size_t most_kept = 256 << 20;  // that are not lent; lending a block takes a tenth of a millisecond

  Recycler() {
    const char* wanted = std::getenv("EVENORM_RECYCLE");
    const bool off = wanted != nullptr && std::strcmp(wanted, "off") == 0;
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    most_idle_ = off || pages < 0 || page < 0 ? 0 : size_t(pages) / 8 * size_t(page);
  }

  static bool lend(const Block& block) {
#if defined(MADV_FREE)
    return madvise(block.data, block.size, MADV_FREE) == 0;
#else
    return block.data == nullptr;
#endif
  }

  static Block mapped(size_t size) {
    void* whole = mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return {};
    char* start = static_cast<char*>(whole);
    const size_t before = (huge - reinterpret_cast<uintptr_t>(start) % huge) % huge;
    if (before > 0) munmap(start, before);
    munmap(start + before + size, huge - before);
#if defined(MADV_HUGEPAGE)
    madvise(start + before, size, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    return {start + before, size};
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the oldest first
  size_t most_idle_ = 0;     // bytes
};

}  // namespace
