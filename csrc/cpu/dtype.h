// The element types of logits, and their conversion a block at a time.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace cmdp {
inline namespace CMDP_ISA {

// Round to nearest, ties to even; a NaN stays a NaN.
static inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The exponent of a half is rebiased by a multiplication with 2^112, which also normalises subnormals; infinities and
// NaNs then only lack the top of their exponent.
static inline float from_float16(uint16_t half) {
  const float magnitude = std::bit_cast<float>(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  return std::bit_cast<float>(bits | uint32_t(half & 0x8000) << 16);
}

static inline uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000u) {                       // subnormal half: let the float adder round
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | static_cast<uint16_t>((magnitude + 0xfff + odd - 0x38000000u) >> 13);
}

static inline void narrow(float value, float* to) { *to = value; }
static inline void narrow(float value, BFloat16* to) { to->bits = to_bfloat16(value); }

static inline double element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(data)[i];
    case DType::bfloat16:
      return widen(static_cast<const BFloat16*>(data)[i]);
    case DType::float16:
      return from_float16(static_cast<const uint16_t*>(data)[i]);
    case DType::float64:
      return static_cast<const double*>(data)[i];
  }
  return 0;
}

static inline void set_element(void* data, DType dtype, int64_t i, double value) {
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

// Elements [from, from + count) as floats: in place for float32, else converted into the buffer. Not for float64.
static inline const float* as_floats(const void* data, DType dtype, int64_t from, int64_t count, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(data) + from;
  const uint16_t* half = static_cast<const uint16_t*>(data) + from;
  int64_t i = 0;
  if (dtype == DType::bfloat16) {
    const BFloat16* brain = static_cast<const BFloat16*>(data) + from;
    for (; i + kLanes <= count; i += kLanes) store(buffer + i, load(brain + i));
    for (; i < count; ++i) buffer[i] = widen(brain[i]);
  } else {
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(narrow));
    }
#endif
    for (; i < count; ++i) buffer[i] = from_float16(half[i]);
  }
  return buffer;
}

static inline void as_doubles(const void* data, DType dtype, int64_t from, int64_t count, double* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = element(data, dtype, from + i);
}

// Writes floats to elements [from, from + count). Not for float64; float32 is written in place by the kernels.
static inline void from_floats(const float* values, void* data, DType dtype, int64_t from, int64_t count) {
  uint16_t* half = static_cast<uint16_t*>(data) + from;
  int64_t i = 0;
  if (dtype == DType::bfloat16) {
    BFloat16* brain = static_cast<BFloat16*>(data) + from;
    for (; i + kLanes <= count; i += kLanes) store(brain + i, load(values + i));
    for (; i < count; ++i) half[i] = to_bfloat16(values[i]);
  } else {
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      const __m128i narrow = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), narrow);
    }
#endif
    for (; i < count; ++i) half[i] = to_float16(values[i]);
  }
}

}  // namespace CMDP_ISA
}  // namespace cmdp
