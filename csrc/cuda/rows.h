// Shared by the launchers: how a row is cut, matrices as the kernels address them, and the choice of a kernel by dtype
// and alignment.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace cmdp::cuda {

constexpr int64_t kMaxGrid = 2147483647;

struct Settings {
  int threads;
  int64_t segment;
};

// 32768 columns of a language model's vocabulary are 8 steps of 16 columns a thread: long enough that merging the
// threads at the end costs a few per cent of them, short enough that a few rows of 151936 columns occupy many
// multiprocessors. In narrow rows threads without columns must not outnumber the others; of very wide ones a warp has
// to hold all segments.
inline Settings settings_of(int64_t vocab) {
  if (vocab < 1024) return {kWarp, 1024};
  if (vocab < 16384) return {kThreads / 2, 16384};
  return {kThreads, 32768 * ((vocab + 32768 * kWarp - 1) / (32768 * kWarp))};
}

// Rows over at most two axes, and why a matrix has no such rows.
inline const char* rows_of(const Matrix& matrix, Rows& rows) {
  if (matrix.rows > kMaxGrid) return "there are more rows than a grid has blocks";
  struct Axis {
    int64_t size = 1, stride = 0;
  } inner, outer;
  int axes = 0;
  for (int d = matrix.dims - 1; d >= 0; --d) {
    const Axis axis{matrix.sizes[d], matrix.strides[d]};
    if (axis.size == 1) continue;
    Axis& last = axes < 2 ? inner : outer;
    if (axes > 0 && axis.stride == last.size * last.stride) {
      last.size *= axis.size;
    } else if (axes == 2) {
      return "a matrix has rows of more than two strides; copy it first";
    } else {
      (axes == 0 ? inner : outer) = axis;
      ++axes;
    }
  }
  rows = {matrix.data, static_cast<uint32_t>(inner.size > 0 ? inner.size : 1), inner.stride, outer.stride};
  return nullptr;
}

// Whether every row begins at a multiple of the size of kVector columns.
template <class T, int kVector>
bool lies_at(const Rows& rows) {
  constexpr int64_t size = sizeof(typename T::Element), at_once = kVector * size;
  return reinterpret_cast<uintptr_t>(rows.data) % at_once == 0 && rows.stride * size % at_once == 0 &&
         rows.outer_stride * size % at_once == 0;
}

template <class Body>
const char* with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(Float32{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    default:
      return "the CUDA kernels take float32, bfloat16 and float16 logits";
  }
}

template <class Body>
const char* with_types(DType x, DType y, const Body& body) {
  return with_type(x, [&]<class X>(X) { return with_type(y, [&]<class Y>(Y) { return body(X{}, Y{}); }); });
}

}  // namespace cmdp::cuda
