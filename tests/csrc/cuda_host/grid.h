// Runs a CUDA grid on the host, for tests: every thread of a block is a fiber, which runs until it waits.
//
// A thread that waits really waits: at a barrier for the threads of its block that have not returned, at a warp's
// operation for all lanes of its mask, which then exchange their values at once. Between two waits a thread runs alone.
// A seed draws which thread goes next, the order of the blocks, how many are under way at once and when one gives way
// to another. A missing barrier, or a result that depends on an order, therefore shows as a result that changes. Seed 0
// draws nothing: one block after another, one thread after another.
//
// A launch ends with a Fault that names the place, if
//   - threads of a block wait at different barriers, or some at a barrier and some for another lane;
//   - lanes of a warp wait with different masks or at different places, a mask names a lane that has returned or does
//     not exist, or a lane asks for the value of one that the mask does not name;
//   - memory is accessed 64 or 128 bits at a time at an address that is not a multiple of that (cuda.h);
//   - an atomic on global memory has no __threadfence between the block's writes and itself (other blocks might see the
//     one without the other), or none between itself and the next wait or return of its thread (the thread might read
//     values from before).
// Shared memory is filled with 0xff before every block: NaN as a number, -1 as an integer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "shared.h"

struct Index3 {
  unsigned x, y, z;
};

// Of the thread that runs.
inline Index3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    if (line == 0) return file;
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

enum class Wait { nothing, barrier, warp, returned };

// A warp's operation: the results of all lanes from the values of all lanes.
struct Exchange {
  uint32_t mask;
  uint64_t value;
  int source;  // the lane whose value is wanted; kAll: the bits of all lanes' values that are not 0
  static constexpr int kAll = -1;
};

struct Thread {
  Context context;
  int number;
  Wait wait;
  Site site;
  Exchange exchange;
  uint64_t result;
  bool fenced, fenced_before;  // since, and between the last barrier and the one before
  bool owes_fence;
};

struct Block {
  unsigned index;
  size_t left;  // threads that have not returned
  bool asleep;  // until no other can go on
  std::vector<Thread> threads;
  std::vector<int> ready;
  std::vector<char> shared;  // while another block is on
};

class Grid {
 public:
  // The seed of all draws from now on. 0: nothing is drawn.
  void seed(uint64_t value) { random_ = value; }

  uint64_t launches() const { return launches_; }

  // Runs `body` as every thread of every block.
  void run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> alone(mutex_);
    ++launches_;
    body_ = &body, threads_ = threads, fault_.clear();
    gridDim = {blocks, 1, 1}, blockDim = {threads, 1, 1};
    range_ = shared_range();
    const std::vector<char> before(range_.data, range_.data + range_.size);
    order_.resize(blocks);
    std::iota(order_.begin(), order_.end(), 0u);
    if (random_ != 0) {
      for (size_t i = blocks; i > 1; --i) std::swap(order_[i - 1], order_[draw(i)]);
    }
    slots_.resize(random_ != 0 ? 1 + draw(4) : 1);
    // From blocks that take turns thread by thread to one that lies still while others run to their end.
    turns_ = random_ != 0 ? 4u << 4 * draw(3) : 0;
    run_blocks();
    std::memcpy(range_.data, before.data(), before.size());
    if (!fault_.empty()) throw Fault(fault_);
  }

  // --- Called by threads

  void barrier(Site site) { pause(Wait::barrier, site); }

  // Results for all lanes of the mask are there when this returns.
  uint64_t exchange(Exchange what, Site site) {
    thread_->exchange = what;
    pause(Wait::warp, site);
    return thread_->result;
  }

  void fence() { thread_->fenced = true, thread_->owes_fence = false; }

  // Before an atomic: other threads may come first.
  void atomic(const void* address, Site site) {
    const bool global = !range_.holds(address);
    if (global && !fenced()) fail("an atomic on global memory without a __threadfence before it", site);
    pause(Wait::nothing, site);
    thread_->owes_fence = thread_->owes_fence || global;
    // Other blocks may have to do without the work that this block has not done yet.
    block_->asleep = global && random_ != 0 && draw(2) == 0;
  }

  [[noreturn]] void fail(const std::string& what, Site site) {
    fault_ = what + " at " + site.text() + ", thread " + std::to_string(thread_->number) + " of block " +
             std::to_string(block_->index);
    thread_->context.switch_to(scheduler_);
    __builtin_unreachable();
  }

  int lane() const { return thread_->number % warpSize; }

 private:
  uint64_t draw(uint64_t below) {  // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
  }

  void pause(Wait wait, Site site) {
    if (wait != Wait::nothing && thread_->owes_fence) {
      thread_->owes_fence = false;
      fail("an atomic on global memory without a __threadfence after it, which is missed", site);
    }
    thread_->wait = wait, thread_->site = site;
    thread_->context.switch_to(scheduler_);
  }

  // Whether what the block has written is fenced off: by this thread since the last barrier, after which it may speak
  // for all, or by every thread before it.
  bool fenced() const {
    if (thread_->fenced) return true;
    for (const Thread& thread : block_->threads) {
      if (!thread.fenced_before && !thread.fenced) return false;
    }
    return true;
  }

  static void enter();

  void begin(size_t slot, unsigned index) {
    Block& block = slots_[slot];
    if (block_ == &block) block_ = nullptr;  // the one before; its shared memory is gone
    block.index = index, block.left = threads_, block.asleep = false;
    block.threads.resize(threads_);
    block.ready.clear();
    for (int i = static_cast<int>(threads_) - 1; i >= 0; --i) {
      Thread& thread = block.threads[i];
      thread = {};
      thread.number = i;
      thread.context.start(stacks_[slot * threads_ + i], Stacks::kSize, &Grid::enter);
      block.ready.push_back(i);
    }
    block.shared.assign(range_.size, static_cast<char>(0xff));
  }

  void run_blocks() {
    size_t next = 0, under_way = 0;
    block_ = nullptr;
    for (Block& block : slots_) block.left = 0;
    const auto fill = [&] {
      for (size_t slot = 0; slot < slots_.size() && next < order_.size(); ++slot) {
        if (slots_[slot].left == 0) begin(slot, order_[next++]), ++under_way;
      }
    };
    for (fill(); under_way > 0;) {
      const bool stay = block_ != nullptr && block_->left > 0 && !block_->asleep;
      if (!stay || (slots_.size() > 1 && draw(turns_) == 0)) choose();
      step();
      if (!fault_.empty()) return;
      if (block_->left == 0) --under_way, fill();
    }
  }

  // Another block goes on; its shared memory comes with it.
  void choose() {
    const auto awake = [](const Block& block) { return block.left > 0 && !block.asleep; };
    if (std::none_of(slots_.begin(), slots_.end(), awake)) {
      for (Block& block : slots_) block.asleep = false;
    }
    const size_t candidates = std::count_if(slots_.begin(), slots_.end(), awake);
    size_t turn = random_ != 0 ? draw(candidates) : 0;
    Block* next = nullptr;
    for (Block& block : slots_) {
      if (awake(block) && turn-- == 0) next = &block;
    }
    if (next == block_) return;
    if (block_ != nullptr) std::memcpy(block_->shared.data(), range_.data, range_.size);
    std::memcpy(range_.data, next->shared.data(), range_.size);
    block_ = next;
  }

  // One thread of the block goes on until it waits.
  void step() {
    std::vector<int>& ready = block_->ready;
    if (ready.empty()) {
      settle();
      if (!fault_.empty()) return;
    }
    if (random_ != 0) std::swap(ready.back(), ready[draw(ready.size())]);
    thread_ = &block_->threads[ready.back()];
    ready.pop_back();
    threadIdx = {static_cast<unsigned>(thread_->number), 0, 0};
    blockIdx = {block_->index, 0, 0};
    scheduler_.switch_to(thread_->context);
    switch (thread_->wait) {
      case Wait::nothing:
        ready.push_back(thread_->number);
        break;
      case Wait::returned:
        --block_->left;
        break;
      case Wait::warp:
        meet();
        break;
      case Wait::barrier:
        break;
    }
  }

  // Nobody can go on: all that are left stand at one barrier, or something is wrong.
  void settle() {
    std::map<std::string, int> places;
    const Thread* first = nullptr;
    bool together = true;
    for (const Thread& thread : block_->threads) {
      if (thread.wait == Wait::returned) continue;
      if (first == nullptr) first = &thread;
      together = together && thread.wait == Wait::barrier && thread.site == first->site;
      ++places[(thread.wait == Wait::barrier ? "at the barrier " : "for lanes of their warp ") + thread.site.text()];
    }
    if (!together) {
      fault_ = "threads of block " + std::to_string(block_->index) + " wait for one another:";
      for (const auto& [place, count] : places) fault_ += " " + std::to_string(count) + " " + place + ";";
      fault_.back() = '.';
      return;
    }
    for (auto thread = block_->threads.rbegin(); thread != block_->threads.rend(); ++thread) {
      if (thread->wait == Wait::returned) continue;
      thread->fenced_before = thread->fenced, thread->fenced = false;
      block_->ready.push_back(thread->number);
    }
  }

  // A lane has come to its warp's operation; the last one brings the results for all.
  void meet() {
    const uint32_t mask = thread_->exchange.mask;
    const int first = thread_->number / warpSize * warpSize;
    if ((mask >> lane() & 1) == 0) return refuse("a lane that its own mask does not name");
    std::vector<Thread>& threads = block_->threads;
    for (int i = 0; i < warpSize; ++i) {
      if ((mask >> i & 1) == 0) continue;
      if (first + i >= static_cast<int>(threads.size())) return refuse("a mask names a lane that does not exist");
      const Thread& other = threads[first + i];
      if (other.wait == Wait::returned) return refuse("a mask names a lane that has returned");
      if (other.wait != Wait::warp) return;
      if (other.exchange.mask != mask) return refuse("lanes wait with different masks");
      if (!(other.site == thread_->site)) return refuse("lanes of a warp wait here and at " + other.site.text());
    }
    uint64_t all = 0;
    for (int i = 0; i < warpSize; ++i) {
      if (mask >> i & 1) all |= uint64_t{threads[first + i].exchange.value != 0} << i;
    }
    for (int i = warpSize - 1; i >= 0; --i) {
      if ((mask >> i & 1) == 0) continue;
      Thread& lane = threads[first + i];
      const int source = lane.exchange.source;
      if (source != Exchange::kAll && (mask >> source & 1) == 0) {
        return refuse("a lane asks for one that the mask does not name");
      }
      lane.result = source == Exchange::kAll ? all : threads[first + source].exchange.value;
    }
    for (int i = warpSize - 1; i >= 0; --i) {
      if ((mask >> i & 1) == 0) continue;
      threads[first + i].wait = Wait::nothing;
      block_->ready.push_back(first + i);
    }
  }

  void refuse(const std::string& what) {
    fault_ = what + " (" + thread_->site.text() + ", thread " + std::to_string(thread_->number) + " of block " +
             std::to_string(block_->index) + ")";
  }

  std::mutex mutex_;
  uint64_t random_ = 0, launches_ = 0;
  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0;
  uint64_t turns_ = 0;  // one in so many steps may give way to another block
  Range range_;
  Stacks stacks_;
  std::vector<unsigned> order_;
  std::vector<Block> slots_;
  Block* block_ = nullptr;
  Thread* thread_ = nullptr;
  Context scheduler_;
  std::string fault_;
};

inline Grid grid;

inline void Grid::enter() {
  (*grid.body_)();
  grid.pause(Wait::returned, {"the end", 0});
  __builtin_unreachable();
}

}  // namespace cuda_host
