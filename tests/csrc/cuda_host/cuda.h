// The part of CUDA that the kernels of csrc/cuda are written in, for a host compiler: `g++ -x c++ -include cuda.h`.
// How a grid runs, and which faults end it, stands in grid.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Where a call stands, as the default of its last parameter.
#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- Vectors, accessed at once

namespace cuda_host {
// A copy has no place in the source of its own; the fault names the thread.
template <class Vector>
void check_alignment(const Vector* address) {
  const void* where = address;
  asm volatile("" : "+r"(where));  // the compiler believes that it is aligned, and would not look
  if (reinterpret_cast<uintptr_t>(where) % sizeof(Vector) != 0) {
    grid.fail("an access that is not aligned", {sizeof(Vector) == 16 ? "128 bits" : "64 bits", 0});
  }
}
}  // namespace cuda_host

struct alignas(16) uint4 {
  unsigned x, y, z, w;

  uint4(unsigned x, unsigned y, unsigned z, unsigned w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4& other) { *this = other; }
  uint4& operator=(const uint4& other) {
    cuda_host::check_alignment(this), cuda_host::check_alignment(&other);
    x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};

struct alignas(8) uint2 {
  unsigned x, y;

  uint2(unsigned x, unsigned y) : x(x), y(y) {}
  uint2(const uint2& other) { *this = other; }
  uint2& operator=(const uint2& other) {
    cuda_host::check_alignment(this), cuda_host::check_alignment(&other);
    x = other.x, y = other.y;
    return *this;
  }
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// --- Threads together

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::grid.barrier({file, line}); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_HOST_SITE) {
  cuda_host::grid.exchange({mask, 0, cuda_host::Exchange::kAll}, {file, line});
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize, CUDA_HOST_SITE) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const int group = cuda_host::grid.lane() & ~(width - 1);
  bits = cuda_host::grid.exchange({mask, bits, group + (source & (width - 1))}, {file, line});
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flipped, int width = warpSize, CUDA_HOST_SITE) {
  return __shfl_sync(mask, value, cuda_host::grid.lane() ^ flipped, width, file, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<uint32_t>(
      cuda_host::grid.exchange({mask, predicate != 0, cuda_host::Exchange::kAll}, {file, line}));
}

inline int __any_sync(uint32_t mask, int predicate, CUDA_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

// --- Memory shared with others

// Nothing to do: one system thread sees its own writes in order. Its absence is noticed (grid.h).
inline void __threadfence() { cuda_host::grid.fence(); }

inline unsigned atomicInc(unsigned* address, unsigned last, CUDA_HOST_SITE) {
  cuda_host::grid.atomic(address, {file, line});
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

inline int atomicAdd(int* address, int value, CUDA_HOST_SITE) {
  cuda_host::grid.atomic(address, {file, line});
  const int old = *address;
  *address = old + value;
  return old;
}

inline int atomicMin(int* address, int value, CUDA_HOST_SITE) {
  cuda_host::grid.atomic(address, {file, line});
  const int old = *address;
  if (value < old) *address = value;
  return old;
}

// --- Launching

namespace cmdp::cuda {

template <class... P>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, void*, std::type_identity_t<P>... arguments) {
  cuda_host::grid.run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace cmdp::cuda

// --- For the tests of kernels

#define CMDP_CUDA_HOST  // the Python module says that it takes CPU tensors

#define CUDA_HOST_EXPORT extern "C" __attribute__((used, visibility("default"))) inline

CUDA_HOST_EXPORT void cuda_host_seed(uint64_t seed) { cuda_host::grid.seed(seed); }
CUDA_HOST_EXPORT uint64_t cuda_host_launches() { return cuda_host::grid.launches(); }
