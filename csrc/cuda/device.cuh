// The machine as the kernels need it, in functions with one-word jobs. Each has a host alternative of the same
// meaning, so that the kernels' own source can be compiled and run on a processor (launch.h lists the names that have
// to stand in for CUDA there).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../logits.h"
#include "../token_state.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace cmdp::cuda {

// The most threads of a block. Registers are limited so that as many such blocks fit a multiprocessor as make half of
// the warps it can hold: 64, or 48 on consumer GPUs.
constexpr int kThreads = 256;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif
// Where rows are not aligned a thread holds many narrow loads, and needs registers more than the memory needs warps.
template <bool kAligned>
constexpr int blocks() {
  return kAligned ? kBlocks : kBlocks - 1;
}
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;

#ifdef __CUDACC__
template <class... P>
const char* launch(void (*kernel)(P...), int64_t grid, int block, void* stream, std::type_identity_t<P>... arguments) {
  kernel<<<static_cast<unsigned>(grid), block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// 2^t; 0 where that is not a normal number.
__device__ __forceinline__ float ex2(float t) {
#ifdef __CUDACC__
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(t));
  return p;
#else
  return t < -126.0f ? 0.0f : exp2f(t);
#endif
}

// --------------------------------------------------------------------------------------------------------------
// Element types. Columns travel in 32-bit words, of which one holds kColumns of them.

struct Float32 {
  using Element = uint32_t;
  static constexpr int kColumns = 1;
};
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kColumns = 2;
};
struct Float16 {
  using Element = uint16_t;
  static constexpr int kColumns = 2;
};

// Column `half` of a word.
template <class T>
__device__ __forceinline__ float widen(uint32_t word, int half) {
  if constexpr (std::is_same_v<T, Float32>) {
    return std::bit_cast<float>(word);
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // a bfloat16 is the upper half of a float
    return std::bit_cast<float>(half == 0 ? word << 16 : word & 0xffff0000u);
  } else {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(word >> 16 * half)));
    return value;
#else
    return from_float16(static_cast<uint16_t>(word >> 16 * half));
#endif
  }
}

// One column of a row, and the word that two columns make.
template <class T>
__device__ __forceinline__ float column(const typename T::Element* row, int64_t i) {
  return widen<T>(row[i], 0);
}

// A float rounded to nearest, ties to even, as one element.
template <class T>
__device__ __forceinline__ typename T::Element narrow(float value) {
  if constexpr (std::is_same_v<T, Float32>) {
    return std::bit_cast<uint32_t>(value);
  } else {
    uint16_t bits;
#ifdef __CUDACC__
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
#else
    bits = std::is_same_v<T, BFloat16> ? to_bfloat16(value) : to_float16(value);
#endif
    return bits;
  }
}

// Two 16-bit columns as a word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return uint32_t{narrow<T>(low)} | uint32_t{narrow<T>(high)} << 16;
#endif
}

// The larger of two words, column by column. A NaN loses.
template <class T>
__device__ __forceinline__ uint32_t larger(uint32_t one, uint32_t other) {
  if constexpr (std::is_same_v<T, Float32>) {
    return std::bit_cast<uint32_t>(fmaxf(std::bit_cast<float>(one), std::bit_cast<float>(other)));
  } else {
#ifdef __CUDACC__
    uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(one), "r"(other));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(one), "r"(other));
    }
    return word;
#else
    return pack<T>(fmaxf(widen<T>(one, 0), widen<T>(other, 0)), fmaxf(widen<T>(one, 1), widen<T>(other, 1)));
#endif
  }
}

// The maximum of all columns of some words.
template <class T, int kWords>
__device__ __forceinline__ float highest(const uint32_t (&words)[kWords]) {
  uint32_t best = words[0];
#pragma unroll
  for (int i = 1; i < kWords; ++i) best = larger<T>(best, words[i]);
  if constexpr (T::kColumns == 1) return widen<T>(best, 0);
  return fmaxf(widen<T>(best, 0), widen<T>(best, 1));
}

// --------------------------------------------------------------------------------------------------------------
// Memory. A step gives a thread kStep columns of both models, in pieces of kVector neighbouring ones; the 32 threads of
// a warp share 32 kStep neighbouring columns, piece by piece. Which thread gets which columns, and in what order,
// depends on nothing but the dtypes: where a row happens to lie must not change its result.

// Columns of one 128-bit load of the wider dtype, and of a step.
template <class X, class Y>
struct Shape {
  static constexpr int kVector = X::kColumns == 2 && Y::kColumns == 2 ? 8 : 4;
  static constexpr int kPieces = 2;
  static constexpr int kStep = kPieces * kVector;
  static constexpr int kHop = kWarp * kVector;  // columns from one piece to the next
};

// Where a thread's first piece begins among the columns of its block.
template <class S>
__device__ __forceinline__ int first_column() {
  return static_cast<int>(threadIdx.x) / kWarp * kWarp * S::kStep + static_cast<int>(threadIdx.x) % kWarp * S::kVector;
}

// kVector columns at once. They lie at a multiple of their size.
template <class T, int kWords>
__device__ __forceinline__ void load(const typename T::Element* from, uint32_t* words) {
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    static_assert(kWords == 2);
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  }
}

template <class T, int kWords>
__device__ __forceinline__ void store(typename T::Element* to, const uint32_t* words) {
  if constexpr (kWords == 4) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    static_assert(kWords == 2);
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
}

// The words of one step, by 128-bit loads (64-bit ones of the narrower of two dtypes) or one load per column.
template <class T, class S, bool kAligned>
__device__ __forceinline__ void read(const typename T::Element* at, uint32_t (&words)[S::kStep / T::kColumns]) {
  constexpr int kWords = S::kVector / T::kColumns;
#pragma unroll
  for (int piece = 0; piece < S::kPieces; ++piece) {
    if constexpr (kAligned) {
      load<T, kWords>(at + piece * S::kHop, words + piece * kWords);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const auto* from = at + piece * S::kHop + i * T::kColumns;
        words[piece * kWords + i] = T::kColumns == 1 ? from[0] : from[0] | static_cast<uint32_t>(from[1]) << 16;
      }
    }
  }
}

// One piece of which only `count` columns may exist, by one load per column. The last one stands in for columns beyond
// the end.
template <class T, int kWords>
__device__ __forceinline__ void read_some(const typename T::Element* at, int count, uint32_t (&words)[kWords]) {
  const auto before = [count](int i) { return i < count ? i : count - 1; };
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = at[before(w * T::kColumns)];
    if constexpr (T::kColumns == 2) words[w] |= static_cast<uint32_t>(at[before(w * 2 + 1)]) << 16;
  }
}

// Rows of a matrix over at most two axes: row i begins at i / inner * outer_stride + i % inner * stride.
struct Rows {
  char* data;
  uint32_t inner;
  int64_t stride, outer_stride;

  template <class T>
  __device__ __forceinline__ typename T::Element* row(uint32_t i) const {
    const uint32_t outer = i / inner;
    return reinterpret_cast<typename T::Element*>(data) + (outer * outer_stride + (i - outer * inner) * stride);
  }
};

// --------------------------------------------------------------------------------------------------------------
// All threads of a group of kCount neighbouring lanes get the same, in an order that depends on kCount alone.

template <int kCount = kWarp>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int apart = kCount / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
  return value;
}

template <int kCount = kWarp>
__device__ __forceinline__ float max_of_lanes(float value) {
#pragma unroll
  for (int apart = kCount / 2; apart > 0; apart /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, apart));
  return value;
}

// --------------------------------------------------------------------------------------------------------------
// Blocks that wait for none

// True for the last of `count` arrivals; token_stats.cuh says what they are for.
__device__ __forceinline__ bool arrive(uint32_t* counter, uint32_t count) {
  __threadfence();
  const bool last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return last;
}

}  // namespace cmdp::cuda
