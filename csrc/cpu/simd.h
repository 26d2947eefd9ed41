// A vector of floats as wide as the instruction set, and the few operations that the kernels need on it.
//
// The compiler's vector types give + - * / and lane access; intrinsics appear only where the language has no word
// (max without a NaN detour, half-precision conversion). Compiled once per instruction set, see CMakeLists.txt.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../logits.h"  // CMDP_ISA, conversions of one 16-bit float

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
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float))));  // for arithmetic on bits, which may wrap
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));

static inline Floats splat(float value) { return value - Floats{}; }

static inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Widening a bfloat16 while loading it costs two instructions and no memory.
struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float value) { return value; }
static inline float widen(BFloat16 value) { return from_bfloat16(value.bits); }

static inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 would widen two halves and join them
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  Shorts narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Floats)(__builtin_convertvector(narrow, Ints) << 16);
#endif
}

static inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Rounds as to_bfloat16 does.
static inline void store(BFloat16* to, Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words narrow = v == v ? rounded : Words{} + 0x7fc0;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)narrow));
#else
  const Shorts halves = __builtin_convertvector(narrow, Shorts);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

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

// a b + c with one rounding, wherever the expression stands: the compiler's own contraction stops at basic blocks, and
// a logit times the scale, rounded before the reference comes off, would lose the digits that the difference needs.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else  // no such instruction: the product is exact in double
  typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
  const auto wide = [](Floats v) { return __builtin_convertvector(v, Doubles); };
  return __builtin_convertvector(wide(a) * wide(b) + wide(c), Floats);
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
  constexpr float unit = 1.0f / static_cast<float>(uint64_t{1} << lowered / 2) /
                         static_cast<float>(uint64_t{1} << (lowered - lowered / 2));
  Floats p = f * (unit * 0x1.5bba14p-10f) + unit * 0x1.3cea88p-7f;
  p = p * f + unit * 0x1.c6b752p-5f;
  p = p * f + unit * 0x1.ebf9bcp-3f;
  p = p * f + unit * 0x1.62e42ap-1f;
  return p * f + unit;
}

// A finite argument at or below which exp2 is exactly 0.
constexpr float kWeightless = -200.0f;

#if defined(__AVX512F__)
// 2^t, a NaN for -inf. AVX-512 rounds in one instruction, and scales by a power of two in another that saturates and
// underflows as it should; there is nothing to clamp and nothing to be `seen`.
static inline Floats exp2(Floats t) {
  const Floats integer = (Floats)_mm512_roundscale_ps((__m512)t, 0x08);  // to nearest
  return (Floats)_mm512_scalef_ps((__m512)exp2_fraction<0>(t - integer), (__m512)integer);
}

static inline Floats exp2_in_range(Floats t, Words&) { return exp2(t); }
static inline bool in_range(Words) { return true; }
#else
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
  return (Floats)((Words)exp2_fraction<0>(f) + ((Words)shifted << 23));
}

// 2^t for t in [-104, 23], without a clamp: two integer operations in place of two comparisons. `seen` tells whether
// every t was in the range: it collects the bits that the shifted sums have beside those of 1.5 * 2^23. Biased by 104
// the integers fit in seven bits, and any other value, infinities and NaNs included, changes a bit above those.
constexpr int kExponentBias = 104;
constexpr uint32_t kMagicBits = 0x4b400000;

static inline Floats exp2_in_range(Floats t, Words& seen) {
  const Floats magic = splat(12582912.0f + kExponentBias);
  const Floats shifted = t + magic;
  seen |= (Words)shifted ^ kMagicBits;
  const Floats f = t - (shifted - magic);
  return (Floats)((Words)exp2_fraction<kExponentBias>(f) + ((Words)shifted << 23));
}

static inline bool in_range(Words seen) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= seen[i];
  return all < 128;
}
#endif

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
