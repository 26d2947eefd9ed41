// The tail of a row: all columns of a student's logits but the few that a teacher has listed, as the CPU and the CUDA
// side both see it. cmdp_fast/tails.py says what the state means, and cmdp_fast/layout.py what the gradient is made of.
#pragma once

#include <cmath>
#include <cstdint>

#include "logits.h"
#include "scale.h"

namespace cmdp {

// Rows and what is listed of each. The pair's teacher is the student again: there is no other row to read.
struct ListedRows {
  Logits in;
  const int64_t* ids;  // [rows, listed] columns of the whole vocabulary, ascending, each once; -1 anywhere is none
  int64_t listed;
};

// What the columns outside of the list are folded into.
struct TailFields {
  double m, z, h, low;  // reference, sum e^(x-m), sum e^(x-m) (x-m), min x
};

struct TailStates {
  TailFields* fields;  // [rows]
  double* listed;      // [rows, listed] logits / temperature; written where the column lies in this tile
  double* own;         // [rows] that of the token, likewise
};

// Of a column v outside of the list e^l (constant + slope l) with l = x(v) - reference - log_mass, and `own` more if v
// is the token; that of a listed column is given. [rows] each, and [rows, listed].
struct TailGradient {
  const double *reference, *log_mass, *constant, *slope, *own, *listed;
};

inline namespace CMDP_ISA {

CMDP_HD static inline void merge(TailFields& mine, TailFields other) {
  const double top = mine.m > other.m ? mine.m : other.m;
  for (TailFields* part : {&mine, &other}) {
    if (part->z == 0) continue;  // nothing to scale, and a reference that may be -inf
    const double drop = part->m - top, shrink = std::exp(drop);
    part->z *= shrink;
    part->h = shrunk(part->h, shrink, drop, part->z);
  }
  mine = {top, mine.z + other.z, mine.h + other.h, mine.low < other.low ? mine.low : other.low};
}

// One column of the tail in double.
struct TailColumn {
  double reference, log_mass, constant, slope;
  Natural scale;

  CMDP_HD double operator()(double logit) const {
    const double log_p = (scaled(logit, scale) - reference) - log_mass, p = std::exp(log_p);
    return p == 0 || log_mass == -TokenState::infinity() ? 0 : p * (constant + slope * log_p);
  }
};

// The same in floats: 2^t (at_zero + per_t t) with t = L x - m. The normaliser is m + rest octaves, so that the
// probability is 2^(t - rest).
struct TailSlopes {
  float m, at_zero, per_t;
  bool modest;  // whether no float overflows on the way, and a rest is no more than an octave

  CMDP_HD explicit TailSlopes(const TailColumn& column) {
    const double normalizer = (column.reference + column.log_mass) / kLn2;
    m = static_cast<float>(normalizer);
    const double rest = normalizer - m, weight = std::exp2(-rest), per_octave = column.slope * kLn2;
    per_t = static_cast<float>(weight * per_octave);
    at_zero = static_cast<float>(weight * (column.constant - per_octave * rest));
    modest = std::fabs(per_t) < 1e7f && std::fabs(at_zero) < 1e7f && std::fabs(m) < 1e7f;
  }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
