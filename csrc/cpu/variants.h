// The variants of the kernels that were compiled, and the choice among them.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace cmdp {

struct Variant {
  const KernelTable* table;
  bool supported;  // by the processor we run on
};

#if defined(__x86_64__)
extern const KernelTable table_x86_64_v2, table_x86_64_v3, table_x86_64_v4;

inline std::vector<Variant> variants() {
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return {{&table_x86_64_v2, v2}, {&table_x86_64_v3, v3}, {&table_x86_64_v4, v4}};
}
#else
extern const KernelTable table_baseline;

inline std::vector<Variant> variants() { return {{&table_baseline, true}}; }
#endif

// The best supported variant; null on a processor older than all of them.
inline const KernelTable* best_variant() {
  const KernelTable* best = nullptr;
  for (const Variant& variant : variants()) {
    if (variant.supported) best = variant.table;
  }
  return best;
}

inline const KernelTable* variant_named(const std::string& name) {
  for (const Variant& variant : variants()) {
    if (name != variant.table->name) continue;
    if (!variant.supported) throw std::runtime_error("this processor cannot run the kernel variant '" + name + "'");
    return variant.table;
  }
  throw std::invalid_argument("no kernel variant named '" + name + "'");
}

// The variant that runs; the best one until another is chosen.
inline const KernelTable* active_variant = best_variant();

inline const KernelTable& kernels() {
  if (active_variant == nullptr) throw std::runtime_error("no compiled kernel variant runs on this processor");
  return *active_variant;
}

}  // namespace cmdp
