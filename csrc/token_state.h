// The state of one token: everything that the six statistics need of the columns seen so far.
//
// For logits x (student) and y (teacher), already divided by the temperature, over the columns v seen:
//
//   m = max x     z = sum e^(x-m)     a = sum e^(x-m) ((x-m) - (y-n))     h = sum e^(x-m) (x - m)
//   n = max y     u = sum e^(y-n)     b = sum e^(y-n) ((y-n) - (x-m))     k = sum e^(y-n) (y - n)
//
// plus x and y at the token's own column, and two flags for columns that one model uses and the other excludes.
// m and n need not be the maxima: any finite reference works, a maximum keeps the exponentials in range.
// Raising m by r and n by q multiplies z, a, h by e^-r, before which h loses r z and a loses (r - q) z; likewise the
// teacher's. Two states of disjoint columns are merged by raising both to the larger references and adding. Merging is
// associative and commutative with the empty state as identity, so vector lanes, threads, tiles of the vocabulary and
// ranks are all partial states. Everything is relative to the references, so that a shift of a model's logits, however
// large, costs no precision: KL(p‖w) = a/z - log z + log u.
//
// Logits may be any finite doubles. What weighs nothing adds nothing, however far away it is: 0 * infinity = 0. A
// difference of two logits, or a sum of such differences, that no double holds is infinite: so is a KL that it is part
// of, and so a log-probability, while entropies stay exact and nothing becomes NaN.
//
// A column that is nearly certain weighs 1, and what is added to it loses up to 2^-53 each time. Columns are therefore
// added up in groups of kGroup, groups in blocks, and blocks in a state, so that no sum has many terms.
//
// Header-only, free of any framework, double throughout. CMDP_HD makes it host and device code under nvcc.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#ifndef CMDP_HD
#ifdef __CUDACC__
#define CMDP_HD __host__ __device__
#else
#define CMDP_HD
#endif
#endif
// One namespace per instruction set: the linker must never merge an AVX-512 copy of an inline function into code that
// runs elsewhere.
#ifndef CMDP_ISA
#define CMDP_ISA portable
#endif

namespace cmdp {

// The order of the six statistics, wherever there is one array for each.
enum Statistic : int { kLogprob, kTeacherLogprob, kEntropy, kTeacherEntropy, kReverseKl, kForwardKl, kStatistics };

inline namespace CMDP_ISA {

struct TokenStats {
  double logprob, teacher_logprob, entropy, teacher_entropy, reverse_kl, forward_kl;

  CMDP_HD std::array<double, kStatistics> in_order() const {
    return {logprob, teacher_logprob, entropy, teacher_entropy, reverse_kl, forward_kl};
  }
};

// Raises the references of six sums of floats, in any unit of logits: the student's by -drop = new m - old m, the
// teacher's by -teacher_drop. `shrink` and `teacher_shrink` are the factors of the weights e^(x-m) and e^(y-n).
template <class Sums>
CMDP_HD static inline void shrink_sums(Sums& s, float drop, float teacher_drop, float shrink, float teacher_shrink) {
  const float apart = drop - teacher_drop;
  s.a = std::fmaf(apart, s.z, s.a) * shrink;
  s.b = std::fmaf(-apart, s.u, s.b) * teacher_shrink;
  s.h = std::fmaf(drop, s.z, s.h) * shrink;
  s.k = std::fmaf(teacher_drop, s.u, s.k) * teacher_shrink;
  s.z *= shrink;
  s.u *= teacher_shrink;
}

// A sum of weights times differences after the weights have shrunk, to `weight` in total, and every difference has
// become larger by `rise`, which may be infinite.
CMDP_HD static inline double shrunk(double sum, double shrink, double rise, double weight) {
  return weight == 0 ? 0 : sum * shrink + rise * weight;
}

struct TokenState {
  double m, n;              // references of student and teacher
  double z, u, a, b, h, k;  // the six sums
  double xa, ya;            // the token's logits; -inf until its column has passed
  double r_inf, f_inf;      // 1 once a column was seen that only the student (only the teacher) may use

  static constexpr int kFields = 12;
  static constexpr int64_t kGroup = 16;

  CMDP_HD static double infinity() { return std::numeric_limits<double>::infinity(); }
  CMDP_HD static TokenState empty() {
    const double inf = infinity();
    return {-inf, -inf, 0, 0, 0, 0, 0, 0, -inf, -inf, 0, 0};
  }

  // One column. Excluded columns (-inf) weigh nothing, with any logit of the other model there: 0 * anything = 0.
  CMDP_HD void push(double x, double y) { push_block(&x, &y, 1); }

  // Columns x[0..count), y[0..count). NaN and +inf make the sums NaN or infinite, which finish() turns into NaN.
  CMDP_HD void push_block(const double* x, const double* y, int64_t count) {
    const double inf = infinity();
    double top_x = m, top_y = n;
    for (int64_t i = 0; i < count; ++i) {
      if (x[i] > top_x && x[i] < inf) top_x = x[i];
      if (y[i] > top_y && y[i] < inf) top_y = y[i];
    }
    raise(top_x, top_y);
    TokenState block = unweighted();
    for (int64_t start = 0; start < count; start += kGroup) {
      const int64_t stop = start + kGroup < count ? start + kGroup : count;
      TokenState group = unweighted();
      for (int64_t i = start; i < stop; ++i) group.add_column(x[i], y[i]);
      block.add(group);
    }
    add(block);
  }

  // No columns, relative to the references of this state.
  CMDP_HD TokenState unweighted() const {
    TokenState state = empty();
    state.m = m, state.n = n;
    return state;
  }

  // One column that is not above the references.
  CMDP_HD void add_column(double x, double y) {
    const double inf = infinity();
    const bool has_x = x != -inf, has_y = y != -inf;
    const double t = x - m, s = y - n;
    if (has_x) {
      const double e = std::exp(t);
      z += e;
      if (e != 0) {  // true of a NaN
        h += e * t;
        if (has_y) a += e * (t - s);
      }
    }
    if (has_y) {
      const double e = std::exp(s);
      u += e;
      if (e != 0) {
        k += e * s;
        if (has_x) b += e * (s - t);
      }
    }
    if (has_x && !has_y) r_inf = 1;
    if (has_y && !has_x) f_inf = 1;
  }

  // The token's own column has passed.
  CMDP_HD void label(double x, double y) { xa = x, ya = y; }

  // Moves the references up. A side of no columns (-inf) has nothing to scale and only takes the new reference. One of
  // columns without weight (z = 0) may have one: the other side's b is relative to it.
  CMDP_HD void raise(double new_m, double new_n) {
    const double drop = m != -infinity() ? m - new_m : 0;
    const double teacher_drop = n != -infinity() ? n - new_n : 0;
    if (drop != 0 || teacher_drop != 0) {
      const double shrink = std::exp(drop), teacher_shrink = std::exp(teacher_drop), apart = drop - teacher_drop;
      z *= shrink;
      u *= teacher_shrink;
      a = shrunk(a, shrink, apart, z);
      b = shrunk(b, teacher_shrink, -apart, u);
      h = shrunk(h, shrink, drop, z);
      k = shrunk(k, teacher_shrink, teacher_drop, u);
    }
    m = new_m;
    n = new_n;
  }

  CMDP_HD void merge(TokenState other) {
    const double top_x = m > other.m ? m : other.m, top_y = n > other.n ? n : other.n;
    raise(top_x, top_y);
    other.raise(top_x, top_y);
    add(other);
  }

  // Merges a state of the same references.
  CMDP_HD void add(const TokenState& other) {
    z += other.z, u += other.u, a += other.a, b += other.b, h += other.h, k += other.k;
    xa = xa > other.xa ? xa : other.xa;
    ya = ya > other.ya ? ya : other.ya;
    r_inf = r_inf > other.r_inf ? r_inf : other.r_inf;
    f_inf = f_inf > other.f_inf ? f_inf : other.f_inf;
  }

  // A row is usable if both models have probability somewhere and nothing in it was NaN or +inf.
  CMDP_HD bool valid() const { return z > 0 && z < infinity() && u > 0 && u < infinity(); }

  // Rounding may take a quantity that cannot be negative just below zero; a NaN passes through.
  CMDP_HD static double at_least_zero(double value) { return value < 0 ? 0 : value; }
  CMDP_HD static double at_most_zero(double value) { return value > 0 ? 0 : value; }

  CMDP_HD TokenStats finish() const {
    if (!valid()) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, nan, nan, nan, nan, nan};
    }
    const double log_z = std::log(z), log_u = std::log(u);
    return {
        at_most_zero((xa - m) - log_z),
        at_most_zero((ya - n) - log_u),
        at_least_zero(log_z - h / z),
        at_least_zero(log_u - k / u),
        r_inf != 0 ? infinity() : at_least_zero(a / z - log_z + log_u),
        f_inf != 0 ? infinity() : at_least_zero(b / u - log_u + log_z),
    };
  }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
