// The state of one token: everything that six statistics need to know of the columns seen so far.
//
// For logits x (student) and y (teacher), already divided by the temperature, over the columns v seen:
//
//   m = max x          z = sum e^(x-m)          a = sum e^(x-m) (x - y)       h = sum e^(x-m) (x - m)
//   n = max y          u = sum e^(y-n)          b = sum e^(y-n) (y - x)       k = sum e^(y-n) (y - n)
//
// plus x and y at the token's own column, and two flags for columns that one model uses and the other excludes.
// m and n need not be the maxima: any finite reference works, a maximum keeps the exponentials in range.
// Raising m to m' multiplies z, a, h by e^(m-m'), and h also loses (m'-m) z. Two states of disjoint columns are
// merged by raising both to the larger references and adding. Merging is associative and commutative with the
// empty state as identity, so vector lanes, threads, tiles of the vocabulary and ranks are all partial states.
//
// Header-only, free of any framework, double throughout. Define CMDP_HD as `__host__ __device__` for device code.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifndef CMDP_HD
#define CMDP_HD
#endif
// One namespace an instruction set: the linker must never merge an AVX-512 copy of an inline function into code
// that runs elsewhere.
#ifndef CMDP_ISA
#define CMDP_ISA portable
#endif

namespace cmdp {
inline namespace CMDP_ISA {

struct TokenStats {
  double logprob, teacher_logprob, entropy, teacher_entropy, reverse_kl, forward_kl;
};

struct TokenState {
  double m, n;              // references of student and teacher
  double z, u, a, b, h, k;  // the six sums
  double xa, ya;            // the token's logits; -inf until its column has passed
  double r_inf, f_inf;      // 1 once a column was seen that only the student (only the teacher) may use

  static constexpr int kFields = 12;

  CMDP_HD static double infinity() { return std::numeric_limits<double>::infinity(); }
  CMDP_HD static TokenState empty() {
    const double inf = infinity();
    return {-inf, -inf, 0, 0, 0, 0, 0, 0, -inf, -inf, 0, 0};
  }

  // One column. Excluded columns (-inf) weigh nothing, whatever the other model says there: 0 * anything = 0.
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
    for (int64_t i = 0; i < count; ++i) {
      const bool has_x = x[i] != -inf, has_y = y[i] != -inf;
      if (has_x) {
        const double e = std::exp(x[i] - m);
        z += e;
        h += e * (x[i] - m);
        if (has_y) a += e * (x[i] - y[i]);
      }
      if (has_y) {
        const double e = std::exp(y[i] - n);
        u += e;
        k += e * (y[i] - n);
        if (has_x) b += e * (y[i] - x[i]);
      }
      if (has_x && !has_y) r_inf = 1;
      if (has_y && !has_x) f_inf = 1;
    }
  }

  // The token's own column has passed.
  CMDP_HD void label(double x, double y) { xa = x, ya = y; }

  // Moves the references up. An empty side (z = 0) has nothing to scale and only takes the new reference.
  CMDP_HD void raise(double new_m, double new_n) {
    if (new_m != m) {
      if (z != 0) {
        const double scale = std::exp(m - new_m);
        h = scale * (h - (new_m - m) * z);
        z *= scale;
        a *= scale;
      }
      m = new_m;
    }
    if (new_n != n) {
      if (u != 0) {
        const double scale = std::exp(n - new_n);
        k = scale * (k - (new_n - n) * u);
        u *= scale;
        b *= scale;
      }
      n = new_n;
    }
  }

  CMDP_HD void merge(TokenState other) {
    const double top_x = m > other.m ? m : other.m, top_y = n > other.n ? n : other.n;
    raise(top_x, top_y);
    other.raise(top_x, top_y);
    z += other.z, u += other.u, a += other.a, b += other.b, h += other.h, k += other.k;
    xa = xa > other.xa ? xa : other.xa;
    ya = ya > other.ya ? ya : other.ya;
    r_inf = r_inf > other.r_inf ? r_inf : other.r_inf;
    f_inf = f_inf > other.f_inf ? f_inf : other.f_inf;
  }

  CMDP_HD double log_normalizer() const { return m + std::log(z); }
  CMDP_HD double teacher_log_normalizer() const { return n + std::log(u); }

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
    const double lx = log_normalizer(), ly = teacher_log_normalizer();
    return {
        at_most_zero(xa - lx),
        at_most_zero(ya - ly),
        at_least_zero(std::log(z) - h / z),
        at_least_zero(std::log(u) - k / u),
        r_inf != 0 ? infinity() : at_least_zero(a / z - lx + ly),
        f_inf != 0 ? infinity() : at_least_zero(b / u - ly + lx),
    };
  }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
