// A vector of floats as wide as the instruction set, and the few operations that the kernels need on it.
//
// The compiler's vector types give + - * / and lane access; intrinsics appear only where the language has no word
// (max without a NaN detour, half-precision conversion). Compiled once an instruction set, see CMakeLists.txt.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef CMDP_ISA
#define CMDP_ISA portable
#endif

namespace cmdp {
inline namespace CMDP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));

static inline Floats splat(float value) { return value - Floats{}; }

static inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// A bfloat16 is the upper half of a float: widening it while loading costs two instructions and no memory.
struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float value) { return value; }
static inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

static inline Floats load(const BFloat16* from) {
  Shorts narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Floats)(__builtin_convertvector(narrow, Ints) << 16);
}

static inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// a > b ? a : b in every lane; b where either is NaN.
static inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

static inline float sum_of_lanes(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

static inline float max_of_lanes(Floats v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// 2^f for f in [-1/2, 1/2], times 2^-lowered: the polynomial of degree 5 of least relative error (9.1e-8, 1.6e-7 in
// float arithmetic) among those that are 1 at 0. A power of two in the coefficients costs nothing and rounds nothing.
template <int lowered>
static inline Floats exp2_fraction(Floats f) {
  constexpr float unit = 1.0f / static_cast<float>(uint64_t{1} << lowered / 2) / static_cast<float>(uint64_t{1} << (lowered - lowered / 2));
  Floats p = f * (unit * 0x1.5bba14p-10f) + unit * 0x1.3cea88p-7f;
  p = p * f + unit * 0x1.c6b752p-5f;
  p = p * f + unit * 0x1.ebf9bcp-3f;
  p = p * f + unit * 0x1.62e42ap-1f;
  return p * f + unit;
}

// 2^t for t <= 127, exactly 0 for t <= -127.
//
// t is split into an integer, found by adding and subtracting 1.5 * 2^23, and an exact remainder f in [-1/2, 1/2]; the
// integer is added to the exponent of 2^f. The clamped argument -127 becomes 1.0 with its exponent lowered by 127: the
// bit pattern of zero.
static inline Floats exp2(Floats t) {
  const Floats magic = splat(12582912.0f);
  t = max(t, splat(-127.0f));
  const Floats shifted = t + magic;
  const Floats f = t - (shifted - magic);
  return (Floats)((Ints)exp2_fraction<0>(f) + ((Ints)shifted << 23));
}

// 2^t for t in [-104, 23], without a clamp: one integer `or` in place of two comparisons. Whether every t
// was in the range is told by `seen`, which collects the bits of the integers: biased by 104 they fit in seven bits, and
// anything else, infinities and NaNs included, disturbs the bits above, which are those of 1.5 * 2^23.
constexpr int kExponentBias = 104;
constexpr int32_t kMagicBits = 0x4b400000;
static const Ints kNothingSeen = Ints{} + kMagicBits;

static inline Floats exp2_in_range(Floats t, Ints& seen) {
  const Floats magic = splat(12582912.0f + kExponentBias);
  const Floats shifted = t + magic;
  seen |= (Ints)shifted;
  const Floats f = t - (shifted - magic);
  return (Floats)((Ints)exp2_fraction<kExponentBias>(f) + ((Ints)shifted << 23));
}

static inline bool in_range(Ints seen) {
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= seen[i];
  return (all & ~0x7f) == kMagicBits;
}

// log2(g) for normal g > 0: the exponent, and on the mantissa in [1/sqrt 2, sqrt 2) the series of atanh in
// s = (g-1)/(g+1), |s| <= .1716, whose first dropped term is below 2e-9. Exact at 1, relative error kept around it.
static inline Floats log2(Floats g) {
  const Ints bits = (Ints)g;
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is 1/sqrt 2
  const Floats mantissa = (Floats)(bits - (exponent << 23));
  const Floats s = (mantissa - 1.0f) / (mantissa + 1.0f), s2 = s * s;
  Floats p = s2 * (1.0f / 9) + (1.0f / 7);
  p = p * s2 + 0.2f;
  p = p * s2 + (1.0f / 3);
  p = p * s2 + 1.0f;
  return __builtin_convertvector(exponent, Floats) + s * p * 2.885390082f;  // 2 / ln 2
}

}  // namespace CMDP_ISA
}  // namespace cmdp
