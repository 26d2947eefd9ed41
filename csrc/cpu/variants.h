// The variants of the kernels that were compiled, and the choice among them.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "machine.h"

namespace cmdp {

struct Variant {
  const KernelTable* table;
  bool supported;  // by the processor we run on
};

// build.cmake lists those that were compiled, as CMDP_VARIANT(name) each.
#define CMDP_VARIANT(name) extern const KernelTable table_##name;
CMDP_VARIANTS
#undef CMDP_VARIANT

// Which variants the processor runs.
struct Processor {
  bool baseline = true;
#if defined(__x86_64__)
  bool x86_64_v2, x86_64_v3, x86_64_v4;

  Processor() {
    __builtin_cpu_init();
    x86_64_v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    x86_64_v3 = x86_64_v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    x86_64_v4 = x86_64_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  }
#else
  bool neon = true, sve_128, sve_256;

  Processor() {
    const bool bf16 = arm_capabilities().sve_bf16;
    sve_128 = bf16 && arm_capabilities().sve_bits == 128;
    sve_256 = bf16 && arm_capabilities().sve_bits == 256;
  }
#endif
};

// From the oldest instruction set to the newest.
inline std::vector<Variant> variants() {
  const Processor runs;
#define CMDP_VARIANT(name) {&table_##name, runs.name},
  return {CMDP_VARIANTS};
#undef CMDP_VARIANT
}

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
inline std::atomic<const KernelTable*> active_variant = best_variant();

inline const KernelTable& kernels() {
  const KernelTable* const active = active_variant;
  if (active == nullptr) throw std::runtime_error("no compiled kernel variant runs on this processor");
  return *active;
}

}  // namespace cmdp
