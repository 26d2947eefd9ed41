// Spreads independent items over threads: OpenMP's, which wait for the next call, or in a forked process threads of our
// own. Without OpenMP there is one thread.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#endif

namespace cmdp {

#if defined(_OPENMP)
// What a fork does to threads. The child has none of its parent's, but GCC's OpenMP counts on them there: the first
// parallel region waits for ever. Whether the process had any cannot be asked, PyTorch may have started them. So a
// child starts threads of its own, which costs some 20 microseconds each. tests/csrc/sharing uses them everywhere:
// ThreadSanitizer understands them, and not OpenMP's.
struct Threading {
  std::atomic<bool> own{false};          // whether the next parallel_for starts threads of its own
  std::atomic<bool> started{false};      // whether a parallel_for has used OpenMP's, in this process or its parent
  std::atomic<bool> forked_late{false};  // whether this process was forked after that

  Threading();
};
inline Threading threading;

inline Threading::Threading() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] {
    threading.own = true;
    threading.forked_late = threading.started.load();
  });
#endif
}

// Far more threads than processors help nobody, and OpenMP ends the process where the system refuses it one.
inline int useful_at_most(int threads) {
  constexpr int kFew = 64;
  return threads <= kFew ? threads : std::min(threads, std::max(kFew, omp_get_num_procs()));
}

// The items of one call, which threads take `grain` at a time, so that one that another process slows down does not
// hold up the others.
template <class Body>
class Items {
 public:
  Items(int64_t count, int64_t grain, const Body& body) : count_(count), grain_(grain), body_(body) {
    std::fegetenv(&arithmetic_);
  }

  // Takes items until none is left, with the arithmetic of the thread that has them: each has its own rounding, and may
  // take numbers that are nearly 0 for 0 (torch.set_flush_denormal). An exception must not leave a thread, which would
  // end the process: it is kept, and no more items are handed out.
  void work() noexcept {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&arithmetic_);
    try {
      for (int64_t begin; (begin = next_.fetch_add(grain_, kUnordered)) < count_;) {
        const int64_t end = std::min(count_, begin + grain_);
        for (int64_t i = begin; i < end; ++i) body_(i);
      }
    } catch (...) {
      next_.store(count_, kUnordered);
      if (!failed_.exchange(true, kUnordered)) error_ = std::current_exception();
    }
    std::fesetenv(&own);
  }

  // After all threads have ended.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // The end of all threads alone orders what they have written. More would hide from ThreadSanitizer that two items
  // write to one place.
  static constexpr std::memory_order kUnordered = std::memory_order_relaxed;
  const int64_t count_, grain_;
  const Body& body_;
  std::fenv_t arithmetic_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

template <class Body>
void in_own_threads(Items<Body>& items, int threads) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back([&items] { items.work(); });
  } catch (const std::exception&) {  // no more of them are to be had: those that are there do the work
  }
  items.work();
  for (std::thread& other : others) other.join();
}
#endif

// Calls body(i) for i in [0, items), and throws again what it has thrown first. No result may depend on which thread
// did which item.
template <class Body>
void parallel_for(int64_t items, int threads, int64_t grain, const Body& body) {
#if defined(_OPENMP)
  const int64_t shares = items / grain + (items % grain != 0);
  const int used = static_cast<int>(std::min<int64_t>(useful_at_most(threads), shares));
  if (used > 1) {
    Items<Body> shared(items, grain, body);
    if (threading.own) {
      in_own_threads(shared, used);
    } else {
      threading.started = true;
#pragma omp parallel num_threads(used)
      shared.work();
    }
    shared.rethrow();
    return;
  }
#endif
  (void)threads, (void)grain;
  for (int64_t i = 0; i < items; ++i) body(i);
}

}  // namespace cmdp
