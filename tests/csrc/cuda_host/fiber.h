// Fibers: stacks of their own that one system thread switches between. x86-64 by hand, elsewhere by ucontext.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

#if defined(__x86_64__)
extern "C" void cuda_host_switch(void** save, void* to);
asm(R"(
  .text
  .type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    // Six registers, the entry, and a null for it to return to: the stack lies as it would after a call.
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15}) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer_ = top;
  }
  void switch_to(Context& other) { cuda_host_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack, context_.uc_stack.ss_size = size, context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#endif

// Stacks with a page before each that nobody may touch, kept for the next launch.
class Stacks {
 public:
  static constexpr size_t kSize = 128 * 1024, kGuard = 4096;

  char* operator[](size_t i) {
    while (stacks_.size() <= i) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* fresh = mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (fresh == MAP_FAILED) throw std::bad_alloc();
      mprotect(fresh, kGuard, PROT_NONE);
      stacks_.push_back(static_cast<char*>(fresh) + kGuard);
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

}  // namespace cuda_host
