// Small kernels for the tests of grid.h: right ones, and ones with the faults that it has to find.
#include <algorithm>
#include <functional>
#include <map>
#include <string>

#include "cuda.h"

namespace {

using cmdp::cuda::launch;

constexpr int kBlocks = 6, kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

// Every thread reads what its neighbour wrote.
template <bool kBarrier>
__global__ void neighbours(float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = static_cast<float>(blockIdx.x * kThreads + i);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + i] = values[(i + 1) % kThreads];
}

// The same within a warp.
template <bool kBarrier>
__global__ void lanes(float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = static_cast<float>(i);
  if (kBarrier) __syncwarp();
  out[blockIdx.x * kThreads + i] = values[i ^ 1];
}

// A sum by shuffles: every lane has it.
__global__ void sum(float* out) {
  double value = threadIdx.x;
  for (int apart = warpSize / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
  const int first = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 0);
  const bool any = __any_sync(kAll, threadIdx.x == 40);
  out[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(value + 1000 * first + (any ? 0.5 : 0.0));
}

// The blocks' sum in the order in which they come: floats do not add up alike in every order.
__global__ void order(float* out) {
  if (threadIdx.x == 0) out[0] += 1.0f / static_cast<float>(1 + blockIdx.x * blockIdx.x);
}

// The last block to arrive adds up what all have written, and leaves the counter at zero.
template <bool kBarrier, bool kBefore, bool kAfter>
__global__ void last(float* out, float* parts, unsigned* counter) {
  __shared__ bool mine;
  parts[blockIdx.x * kThreads + threadIdx.x] = 1.0f;
  if (kBefore) __threadfence();
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    mine = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (kAfter) __threadfence();
  }
  __syncthreads();
  if (!mine || threadIdx.x > 0) return;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) out[0] += parts[i];
}

__global__ void divergent_barriers(float*) {
  if (threadIdx.x < 10) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_at_a_barrier(float*) {
  if (threadIdx.x % warpSize < 16) __syncthreads();
  __syncwarp();
}

// A thread that has returned takes no part in a barrier.
__global__ void early_return(float* out) {
  if (threadIdx.x >= 10) return;
  __shared__ float value;
  if (threadIdx.x == 3) value = 5.0f;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = value;
}

__global__ void a_lane_has_returned(float*) {
  if (threadIdx.x == 5) return;
  __syncwarp();
}

__global__ void different_masks(float*) { __syncwarp(threadIdx.x % warpSize < 16 ? kAll : 0xffff0000u); }

__global__ void lane_outside_the_mask(float* out) {
  if (threadIdx.x % warpSize < 16) out[0] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void uninitialised(float* out) {
  __shared__ float values[kThreads];
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x];
}

template <int kShift>
__global__ void wide_load(float* out) {
  const uint4 four = *reinterpret_cast<const uint4*>(out + kThreads + kShift);
  out[threadIdx.x] = std::bit_cast<float>(four.w);
}

template <int kShift>
__global__ void wide_store(float* out) {
  *reinterpret_cast<uint4*>(out + kThreads + kShift) = make_uint4(1, 2, 3, 4);
}

float parts[kBlocks * kThreads];
unsigned counter;

template <class... P, class... A>
void run(void (*kernel)(float*, P...), float* out, A... more) {
  launch(kernel, kBlocks, kThreads, nullptr, out, more...);
}

const std::map<std::string, std::function<void(float*)>> kernels{
    {"neighbours", [](float* out) { run(neighbours<true>, out); }},
    {"missing barrier", [](float* out) { run(neighbours<false>, out); }},
    {"lanes", [](float* out) { run(lanes<true>, out); }},
    {"missing warp barrier", [](float* out) { run(lanes<false>, out); }},
    {"sum", [](float* out) { run(sum, out); }},
    {"order", [](float* out) { run(order, out); }},
    {"last", [](float* out) { run(last<true, true, true>, out, parts, &counter); }},
    {"last without a barrier", [](float* out) { run(last<false, true, true>, out, parts, &counter); }},
    {"last without a fence before", [](float* out) { run(last<true, false, true>, out, parts, &counter); }},
    {"last without a fence after", [](float* out) { run(last<true, true, false>, out, parts, &counter); }},
    {"divergent barriers", [](float* out) { run(divergent_barriers, out); }},
    {"half at a barrier", [](float* out) { run(half_at_a_barrier, out); }},
    {"early return", [](float* out) { run(early_return, out); }},
    {"a lane has returned", [](float* out) { run(a_lane_has_returned, out); }},
    {"different masks", [](float* out) { run(different_masks, out); }},
    {"lane outside the mask", [](float* out) { run(lane_outside_the_mask, out); }},
    {"uninitialised", [](float* out) { run(uninitialised, out); }},
    {"aligned load", [](float* out) { run(wide_load<0>, out); }},
    {"misaligned load", [](float* out) { run(wide_load<1>, out); }},
    {"misaligned store", [](float* out) { run(wide_store<2>, out); }},
};

}  // namespace

// Runs a kernel by name with out [kBlocks * kThreads]. Returns the fault's message, or nothing.
extern "C" const char* run_kernel(const char* name, uint64_t seed, float* out) {
  static std::string message;
  const auto kernel = kernels.find(name);
  if (kernel == kernels.end()) return "no such kernel";
  cuda_host::grid.seed(seed);
  std::fill(parts, parts + kBlocks * kThreads, 0.0f);
  counter = 0;
  try {
    kernel->second(out);
  } catch (const cuda_host::Fault& fault) {
    message = fault.what();
    return message.c_str();
  }
  return counter == 0 ? "" : "the counter is not at zero";
}
