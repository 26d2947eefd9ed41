// What a compiled variant of the kernels offers to the bindings: plain structures and a table of functions.
#pragma once

#include <cstdint>

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

// Internal linkage: this header is compiled once an instruction set, and the copies must not be merged.
static inline void* row_of(const Matrix& matrix, int64_t index) {
  int64_t offset = 0;
  for (int d = matrix.dims - 1; d > 0; --d) {
    offset += index % matrix.sizes[d] * matrix.strides[d];
    index /= matrix.sizes[d];
  }
  if (matrix.dims > 0) offset += index * matrix.strides[0];
  return matrix.data + offset * matrix.element_size;
}

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

// What the backward pass needs of a row: m, n, log z, log u (the log-normalisers are m + log z and n + log u; the parts
// are kept apart because m may be too large for the sum), H, R, and whether the row needs the exact way.
constexpr int kSaved = 7;

// Folded columns of a row: the fields of their state, and whether they needed the exact way.
constexpr int kSegmentState = 13;

// Outputs of the forward pass: six arrays of [rows], float64 if `wide` else float32, and what the backward pass needs.
struct StatsOut {
  void* statistics[6];
  bool wide;
  double* saved;  // [rows, kSaved]
};

// Upstream gradients of logprob, entropy, reverse_kl, forward_kl: [rows] each, or null where there is none.
struct Upstream {
  const double* g[4];
};

// c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w.
struct Mixture {
  double b, c_teacher, c_student;
};

struct KernelTable {
  const char* name;
  int lanes;
  // Work is cut into segments of a row, by a rule that depends on the width alone.
  int64_t (*segments)(int64_t vocab);
  // Folds segments [first, last) of a row into one state each (kSegmentState doubles).
  void (*fold)(const Logits&, int64_t row, int64_t first, int64_t last, double* states);
  // Merges the states of a row in order and writes its statistics.
  void (*finish)(const Logits&, int64_t row, const double* states, int64_t count, const StatsOut&);
  // Merges the columns of a tile into a row's state (kSegmentState doubles).
  void (*update)(const Logits&, int64_t row, double* state);
  // Gradient of one row with respect to the student's logits, written to the row of `out` (which may be the logits).
  void (*backward)(const Logits&, int64_t row, const Upstream&, const double* saved, const Matrix& out);
  // Value of a row's divergence with a mixture, and what its gradient needs (sum p G).
  void (*mixture)(const Logits&, int64_t row, const Mixture&, const double* saved, double* value, double* mean);
  void (*mixture_backward)(const Logits&, int64_t row, const Mixture&, const double* saved, double mean,
                           double upstream, const Matrix& out);
};

}  // namespace cmdp
