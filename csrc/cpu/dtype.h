// Rows of logits of any element type: one element, or a block of them at a time.
#pragma once

#include <cstdint>

#include "../logits.h"
#include "simd.h"

namespace cmdp {
inline namespace CMDP_ISA {

static inline void narrow(float value, float* to) { *to = value; }
static inline void narrow(float value, BFloat16* to) { to->bits = to_bfloat16(value); }

// A row that is read.
struct Row {
  const void* data;
  DType dtype;

  double operator[](int64_t i) const {
    switch (dtype) {
      case DType::float32:
        return static_cast<const float*>(data)[i];
      case DType::bfloat16:
        return from_bfloat16(static_cast<const uint16_t*>(data)[i]);
      case DType::float16:
        return from_float16(static_cast<const uint16_t*>(data)[i]);
      case DType::float64:
        return static_cast<const double*>(data)[i];
    }
    return 0;
  }

  // Elements [from, from + count) as floats: in place for float32, else converted into the buffer. Not for float64.
  const float* floats(int64_t from, int64_t count, float* buffer) const {
    if (dtype == DType::float32) return static_cast<const float*>(data) + from;
    const uint16_t* half = static_cast<const uint16_t*>(data) + from;
    int64_t i = 0;
    if (dtype == DType::bfloat16) {
      const BFloat16* brain = static_cast<const BFloat16*>(data) + from;
      for (; i + kLanes <= count; i += kLanes) store(buffer + i, load(brain + i));
      for (; i < count; ++i) buffer[i] = widen(brain[i]);
    } else {
      if constexpr (kHalves > 0) {
        for (; i + kHalves <= count; i += kHalves) widen_halves(half + i, buffer + i);
      }
      for (; i < count; ++i) buffer[i] = from_float16(half[i]);
    }
    return buffer;
  }
};

// A row that is written.
struct OutRow {
  void* data;
  DType dtype;

  void set(int64_t i, double value) const {
    switch (dtype) {
      case DType::float32:
        static_cast<float*>(data)[i] = static_cast<float>(value);
        break;
      case DType::bfloat16:
        static_cast<uint16_t*>(data)[i] = to_bfloat16(static_cast<float>(value));
        break;
      case DType::float16:
        static_cast<uint16_t*>(data)[i] = to_float16(static_cast<float>(value));
        break;
      case DType::float64:
        static_cast<double*>(data)[i] = value;
        break;
    }
  }

  // Writes floats to elements [from, from + count) of 16 bits each.
  void set_halves(const float* values, int64_t from, int64_t count) const {
    uint16_t* half = static_cast<uint16_t*>(data) + from;
    int64_t i = 0;
    if (dtype == DType::bfloat16) {
      BFloat16* brain = static_cast<BFloat16*>(data) + from;
      for (; i + kLanes <= count; i += kLanes) store(brain + i, load(values + i));
      for (; i < count; ++i) half[i] = to_bfloat16(values[i]);
    } else {
      if constexpr (kHalves > 0) {
        for (; i + kHalves <= count; i += kHalves) narrow_halves(values + i, half + i);
      }
      for (; i < count; ++i) half[i] = to_float16(values[i]);
    }
  }
};

// The rows of both models.
struct RowPair {
  Row x, y;

  RowPair(const Logits& in, int64_t row)
      : x{row_of(in.student, row), in.student.dtype}, y{row_of(in.teacher, row), in.teacher.dtype} {}
  bool are(DType dtype) const { return x.dtype == dtype && y.dtype == dtype; }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
