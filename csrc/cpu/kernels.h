// The face of a compiled variant of the kernels: a table of functions, each of one row.
#pragma once

#include <cstdint>

#include "../logits.h"
#include "../tail.h"

namespace cmdp {

// Folded columns of a row, as they lie in memory: the fields of their TokenState, and 1 if they needed the exact way,
// else 0. A SegmentState (forward.h) in a form that all variants share.
struct StoredState {
  static constexpr int kNumbers = 13;
  double numbers[kNumbers];
};

// c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w.
struct Mixture {
  double b, c_teacher, c_student;
};

// A row's divergence with a mixture, and the number that its gradient needs: sum p G (mixture.h).
struct MixtureValue {
  double value, mean;
};

// The numbers that the gradient of that divergence depends on: sum p G, and the upstream gradient.
struct MixtureGradient {
  double mean, upstream;
};

// `saved` are the SavedRows of all rows.
struct KernelTable {
  const char* name;
  int lanes;
  // Work is cut into segments of a row, by a rule that depends on the width alone.
  int64_t (*segments)(int64_t vocab);
  // Folds segments [first, last) of a row into one state each.
  void (*fold)(const Logits&, int64_t row, int64_t first, int64_t last, StoredState* states);
  // Merges the states of a row in order and writes its statistics.
  void (*finish)(const Logits&, int64_t row, const StoredState* states, int64_t count, const StatsOut&);
  // Merges the columns of a tile into a row's state.
  void (*update)(const Logits&, int64_t row, StoredState& state);
  // Gradient of one row with respect to the student's logits, written to the row of `out` (which may be the logits).
  void (*backward)(const Logits&, int64_t row, const Upstream<double>&, const SavedRow* saved, const Matrix& out);
  MixtureValue (*mixture)(const Logits&, int64_t row, const Mixture&, const SavedRow* saved);
  void (*mixture_backward)(const Logits&, int64_t row, const Mixture&, const SavedRow* saved, const MixtureGradient&,
                           const Matrix& out);
  // Folds the columns of a tile into a row's state.
  void (*update_tail)(const ListedRows&, int64_t row, const TailStates&);
  void (*tail_backward)(const ListedRows&, int64_t row, const TailGradient&, const Matrix& out);
};

}  // namespace cmdp
