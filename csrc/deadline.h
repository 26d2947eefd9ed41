// Ends the process where nothing else can: at a moment that its thread waits for, without Python's lock. A function in
// C that keeps that lock for ever lets no thread of Python say or end anything.
#pragma once

#if defined(__unix__) || defined(__APPLE__)

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace cmdp {

// From when it is made, for as long as it is not called off. A forked process has none: it has no thread of its
// parent's.
class Deadline {
 public:
  // Writes the line to the standard error and ends the process with the code. Time in which the process was stopped
  // does not count, but for a few seconds. Throws std::system_error where there is no room for a thread.
  Deadline(double seconds, std::string line, int code) : process_(getpid()), waiting_(std::make_unique<Waiting>()) {
    Waiting& waiting = *waiting_;
    sigset_t all, before;  // they belong to others: Python's threads are woken by them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      waiting.thread =
          std::thread([&waiting, seconds, line = std::move(line), code] { waiting.run(seconds, line, code); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Deadline() { call_off(); }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

  void call_off() {
    if (!waiting_) return;
    if (getpid() != process_) {  // its thread is not here, and its lock may be held for ever
      waiting_.release();
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(waiting_->mutex);
      waiting_->called_off = true;
    }
    waiting_->changed.notify_one();
    waiting_->thread.join();
    waiting_.reset();
  }

 private:
  struct Waiting {
    std::mutex mutex;
    std::condition_variable changed;
    bool called_off = false;
    std::thread thread;

    void run(double left, const std::string& line, int code) {
      constexpr double kBeat = 1.0;  // one that takes longer than twice as much was stopped meanwhile
      std::unique_lock<std::mutex> lock(mutex);
      while (left > 0) {
        const double beat = std::min(left, kBeat);
        const auto begun = std::chrono::steady_clock::now();
        if (changed.wait_for(lock, std::chrono::duration<double>(beat), [this] { return called_off; })) return;
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begun;
        left -= std::min(passed.count(), 2 * kBeat);
      }
      if (called_off) return;
      pollfd out{STDERR_FILENO, POLLOUT, 0};  // a pipe that nobody reads would block
      [[maybe_unused]] const auto written =
          poll(&out, 1, 1000) == 1 ? write(STDERR_FILENO, line.data(), line.size()) : 0;
      _exit(code);
    }
  };

  const pid_t process_;
  std::unique_ptr<Waiting> waiting_;
};

}  // namespace cmdp

#endif
