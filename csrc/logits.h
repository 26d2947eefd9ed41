// Logits as the CPU and the CUDA side both see them: element types, the place of rows in memory, and everything that
// belongs to a row: mask, token, statistics, saved numbers, upstream gradients.
//
// Plain structures in namespace cmdp: the bindings, every variant of the CPU kernels and the CUDA launchers see the
// same ones. Functions that depend on the instruction set stand in its namespace.
#pragma once

#include <bit>
#include <cstdint>

#include "token_state.h"  // CMDP_HD, CMDP_ISA, the order of the statistics

namespace cmdp {

enum class DType : int { float32, bfloat16, float16, float64 };

// A matrix whose rows may lie anywhere: `dims` leading sizes and strides (in elements), a contiguous last axis.
struct Matrix {
  static constexpr int kMaxDims = 8;
  char* data;
  DType dtype;
  int element_size;
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t rows, width;
};

// Internal linkage: this header is compiled once per instruction set, and the copies must not be merged.
static inline void* row_of(const Matrix& matrix, int64_t index) {
  int64_t offset = 0;
  for (int d = matrix.dims - 1; d > 0; --d) {
    offset += index % matrix.sizes[d] * matrix.strides[d];
    index /= matrix.sizes[d];
  }
  if (matrix.dims > 0) offset += index * matrix.strides[0];
  return matrix.data + offset * matrix.element_size;
}

// Whether a mask (0 = masked; null = all count) lets row or token i count.
CMDP_HD static inline bool unmasked(const uint8_t* mask, int64_t i) { return mask == nullptr || mask[i] != 0; }

// The pair of logits that every kernel reads.
struct Logits {
  Matrix student, teacher;
  const int64_t* tokens;  // [rows]; null for divergences
  const uint8_t* mask;    // [rows], 0 = do not read the row; or null
  int64_t vocab;          // columns that count; the rest is -inf for both models
  double temperature;
  int64_t first_column;  // of the vocabulary: nonzero for a tile of a wider row
};

// Where the token's own column lies within the row, or -1 if another tile holds it.
static inline int64_t own_column(const Logits& in, int64_t row) {
  const uint64_t column = static_cast<uint64_t>(in.tokens[row]) - static_cast<uint64_t>(in.first_column);
  return column < static_cast<uint64_t>(in.vocab) ? static_cast<int64_t>(column) : -1;
}

// The numbers of a row that the backward pass needs, as Python keeps them: [rows, kSaved] doubles. The log-normalisers
// are m + log z and n + log u; the parts are kept apart because m may be too large for the sum.
struct SavedRow {
  double m, n, log_z, log_u;
  double entropy, reverse_kl;
  double exact;  // 1 if the row needs the exact way, else 0
};
constexpr int kSaved = sizeof(SavedRow) / sizeof(double);
static_assert(kSaved == 7 && sizeof(SavedRow) % sizeof(double) == 0);

// Outputs of the forward pass: an array [rows] per statistic, float64 if `wide` else float32 (all null if only `saved`
// is wanted), and a SavedRow per row.
struct StatsOut {
  void* statistics[kStatistics];
  bool wide;
  SavedRow* saved;
};

// Upstream gradients of the four differentiable statistics: [rows] each, or null where there is none.
template <class Real>
struct Upstream {
  const Real *logprob, *entropy, *reverse_kl, *forward_kl;
};

inline namespace CMDP_ISA {

// --------------------------------------------------------------------------------------------------------------
// One 16-bit float, by its bits. Rounding is to nearest, ties to even; a NaN stays a NaN.

// A bfloat16 is the upper half of a float.
static inline float from_bfloat16(uint16_t brain) { return std::bit_cast<float>(uint32_t{brain} << 16); }

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

}  // namespace CMDP_ISA
}  // namespace cmdp
