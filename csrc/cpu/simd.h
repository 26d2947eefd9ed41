// A vector of floats as wide as the instruction set, and the few operations that the kernels need on it.
//
// The compiler's vector types give + - * / and lane access; intrinsics appear only where the language has no word
// (max without a NaN detour, half-precision conversion). Compiled once per instruction set, see build.cmake.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
// SVE vectors of a length that the compiler has been told, see build.cmake.
#if defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS > 0
#define CMDP_SVE __ARM_FEATURE_SVE_BITS
#include <arm_sve.h>
#endif

#include "../logits.h"  // CMDP_ISA, conversions of one 16-bit float

namespace cmdp {
inline namespace CMDP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#elif defined(CMDP_SVE)
constexpr int kLanes = CMDP_SVE / 32;
#else
constexpr int kLanes = 4;
#endif

#if defined(CMDP_SVE)  // for which GCC has the operators of its own vectors
typedef svfloat32_t Floats __attribute__((arm_sve_vector_bits(CMDP_SVE)));
typedef svint32_t Ints __attribute__((arm_sve_vector_bits(CMDP_SVE)));
typedef svuint32_t Words __attribute__((arm_sve_vector_bits(CMDP_SVE)));

static inline svbool_t all() { return svptrue_b32(); }
static inline Floats splat(float value) { return svdup_n_f32(value); }
static inline Floats load(const float* from) { return svld1_f32(all(), from); }
static inline void store(float* to, Floats v) { svst1_f32(all(), to, v); }
#else
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

static inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
#endif

// Widening a bfloat16 while loading it costs two instructions and no memory.
struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float value) { return value; }
static inline float widen(BFloat16 value) { return from_bfloat16(value.bits); }

static inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 would widen two halves and join them
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(CMDP_SVE)
  return svreinterpret_f32_u32(svlsl_n_u32_x(all(), svld1uh_u32(all(), &from->bits), 16));
#elif defined(__aarch64__)  // GCC 12 would widen lane by lane
  return (Floats)vshll_n_u16(vld1_u16(&from->bits), 16);
#else
  Shorts narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Floats)(__builtin_convertvector(narrow, Ints) << 16);
#endif
}

// Rounds as to_bfloat16 does. SVE's instruction, too, but a NaN keeps its sign and the top of its payload.
static inline void store(BFloat16* to, Floats v) {
#if defined(CMDP_SVE)
  const svbfloat16_t narrow = svcvt_bf16_f32_x(all(), v);  // in the lower half of each lane
  svst1h_u32(all(), &to->bits, svreinterpret_u32_bf16(narrow));
#elif defined(__aarch64__)
  // The upper half of bits - (1 - odd) + 0x8000, which is bits + 0x7fff + odd.
  const uint32x4_t number = vceqq_f32(v, v), bits = vbslq_u32(number, (uint32x4_t)v, vdupq_n_u32(0x7fc00000));
  vst1_u16(&to->bits, vrsubhn_u32(bits, vbicq_u32(vdupq_n_u32(1), vshrq_n_u32(bits, 16))));
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words narrow = v == v ? rounded : Words{} + 0x7fc0;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)narrow));
#else
  const Shorts halves = __builtin_convertvector(narrow, Shorts);
  std::memcpy(to, &halves, sizeof halves);
#endif
#endif
}

// float16, as many at a time as there are in a vector of floats or in its half: 0 where there is no instruction for it.
#if defined(CMDP_SVE) && CMDP_SVE > 128  // else NEON's do more at a time
constexpr int kHalves = kLanes;

static inline void widen_halves(const uint16_t* from, float* to) {
  store(to, svcvt_f32_f16_x(all(), svreinterpret_f16_u32(svld1uh_u32(all(), from))));
}
static inline void narrow_halves(const float* from, uint16_t* to) {
  svst1h_u32(all(), to, svreinterpret_u32_f16(svcvt_f16_f32_x(all(), load(from))));
}
#elif defined(__aarch64__)
constexpr int kHalves = 8;

static inline void widen_halves(const uint16_t* from, float* to) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(from));
  vst1q_f32(to, vcvt_f32_f16(vget_low_f16(halves)));
  vst1q_f32(to + 4, vcvt_high_f32_f16(halves));
}
static inline void narrow_halves(const float* from, uint16_t* to) {
  const float16x4_t low = vcvt_f16_f32(vld1q_f32(from));
  vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, vld1q_f32(from + 4))));
}
#elif defined(__F16C__)
constexpr int kHalves = 8;

static inline void widen_halves(const uint16_t* from, float* to) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(narrow));
}
static inline void narrow_halves(const float* from, uint16_t* to) {
  const __m128i narrow = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}
#else
constexpr int kHalves = 0;

static inline void widen_halves(const uint16_t*, float*) {}
static inline void narrow_halves(const float*, uint16_t*) {}
#endif

// a > b ? a : b in every lane; b where a is NaN. The same of a b that may be NaN is max_or_nan.
static inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#elif defined(CMDP_SVE)
  return svmaxnm_f32_x(all(), a, b);
#elif defined(__aarch64__)
  return (Floats)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

// a > b ? a : b in every lane; b where b is NaN.
static inline Floats max_or_nan(Floats a, Floats b) {
#if defined(CMDP_SVE)
  return svmax_f32_x(all(), a, b);
#elif defined(__aarch64__)
  return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return max(a, b);
#endif
}

// Comparisons: all bits of a lane, or none.
static inline Ints differs(Floats a, Floats b) {
#if defined(CMDP_SVE)
  return svdup_n_s32_z(svcmpne_f32(all(), a, b), -1);
#else
  return a != b;
#endif
}

static inline Ints less(Floats a, Floats b) {
#if defined(CMDP_SVE)
  return svdup_n_s32_z(svcmplt_f32(all(), a, b), -1);
#else
  return a < b;
#endif
}

// a in the lanes of which the mask has all bits, b in those of which it has none.
static inline Floats select(Ints mask, Floats a, Floats b) {
#if defined(CMDP_SVE)
  return svsel_f32(svcmpne_n_s32(all(), mask, 0), a, b);
#else
  return mask ? a : b;
#endif
}

static inline Floats to_floats(Ints v) {
#if defined(CMDP_SVE)
  return svcvt_f32_s32_x(all(), v);
#else
  return __builtin_convertvector(v, Floats);
#endif
}

// a b + c with one rounding, wherever the expression stands: the compiler's own contraction stops at basic blocks, and
// a logit times the scale, rounded before the reference comes off, would lose the digits that the difference needs.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(CMDP_SVE)
  return svmad_f32_x(all(), a, b, c);
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

// Whether exp2_in_range notices what is out of range. Without, floats go on with logits as low as any.
#if defined(__AVX512F__)
constexpr bool kSeesRange = false;
#else
constexpr bool kSeesRange = true;
#endif

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
#elif defined(CMDP_SVE)
// 2^t of t = integer / 64 + f with |f| <= 1/128: FEXPA makes 2^(integer / 64), its exponent included, of the integer's
// lower 14 bits, biased by 127; of 2^f - 1 two terms are left (error 7e-9). 0 has 2^0 = 1. A bias below 1 makes a
// number below 2^-126, and exactly 0 of t = -127.
constexpr float kShift = 0x1.8p17f + 127;
constexpr uint32_t kShiftBits = 0x48400000;  // of 0x1.8p17f

static inline Floats exp2_of(Floats t, Floats shifted) {
  const Floats f = t - (shifted - kShift);
  const Floats power = svexpa_f32((Words)shifted);
  return power + power * (f * (f * 0x1.ebfbep-3f + 0x1.62e456p-1f));
}

// 2^t for t <= 127, exactly 0 for t <= -127.
static inline Floats exp2(Floats t) {
  t = max(t, splat(-127.0f));
  return exp2_of(t, t + kShift);
}

// 2^t for t in (-127, 128) without a clamp. `seen` tells whether every t was in the range: any other value, infinities
// and NaNs included, changes a bit above the lower 14.
static inline Floats exp2_in_range(Floats t, Words& seen) {
  const Floats shifted = t + kShift;
  seen |= (Words)shifted ^ kShiftBits;
  return exp2_of(t, shifted);
}

static inline bool in_range(Words seen) { return svmaxv_u32(all(), seen) < 1u << 14; }
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

// log2(g) for normal g = 1 - v > 0: the exponent, and on the mantissa in [1/sqrt 2, sqrt 2) the series of atanh in
// s = (g-1)/(g+1), |s| <= .1716, whose first dropped term is below 2e-9. Up to |v| = 1/4 g - 1 is -v, of which g has
// lost what is small: the relative error is some units in the last place for any v.
static inline Floats log2_one_less(Floats g, Floats v) {
  const Ints bits = (Ints)g;
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is 1/sqrt 2
  const Floats mantissa = (Floats)(bits - (exponent << 23));
  const Floats above = select(less(max(v, -v), splat(0.25f)), -v, mantissa - 1.0f);
  const Floats s = above / (mantissa + 1.0f), s2 = s * s;
  Floats p = s2 * (1.0f / 9) + (1.0f / 7);
  p = p * s2 + 0.2f;
  p = p * s2 + (1.0f / 3);
  p = p * s2 + 1.0f;
  return to_floats(exponent) + s * p * 2.885390082f;  // 2 / ln 2
}

}  // namespace CMDP_ISA
}  // namespace cmdp
