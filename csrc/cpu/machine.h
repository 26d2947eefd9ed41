// The module's questions to the machine it runs on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif
#endif

namespace cmdp {

// What an ARM processor has beyond NEON, as Linux tells; nothing elsewhere. Bits and calls are spelled out as numbers,
// which are fixed for ever: headers older than a bit do not name it.
struct ArmCapabilities {
  unsigned long first = 0, second = 0;
  int sve_bits = 0;  // of a vector; 0 without SVE
  bool sve_bf16 = false;

  ArmCapabilities() {
#if defined(__linux__) && defined(__aarch64__)
    first = getauxval(16), second = getauxval(26);  // AT_HWCAP, AT_HWCAP2
    if (first >> 22 & 1) {                          // HWCAP_SVE
      const int length = prctl(51);                 // PR_SVE_GET_VL: bytes in the lower 16 bits
      if (length > 0) sve_bits = (length & 0xffff) * 8;
    }
    sve_bf16 = sve_bits > 0 && (second >> 12 & 1);  // HWCAP2_SVEBF16
#endif
  }
};

inline ArmCapabilities arm_capabilities() { return {}; }

// The processor's instruction sets, for `cmdp-fast info`.
inline std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define CMDP_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.push_back(name);
  CMDP_FEATURE("sse4.2")
  CMDP_FEATURE("avx")
  CMDP_FEATURE("avx2")
  CMDP_FEATURE("fma")
  CMDP_FEATURE("f16c")
  CMDP_FEATURE("avx512f")
  CMDP_FEATURE("avx512bw")
  CMDP_FEATURE("avx512vl")
#undef CMDP_FEATURE
#elif defined(__aarch64__)  // by the names of /proc/cpuinfo
  const ArmCapabilities has = arm_capabilities();
  const auto feature = [&](unsigned long word, int bit, const char* name) {
    if (word >> bit & 1) features.push_back(name);
  };
  features.push_back("asimd");  // NEON, which every such processor has
  feature(has.first, 10, "asimdhp");
  feature(has.first, 20, "asimddp");
  feature(has.second, 14, "bf16");
  feature(has.first, 22, "sve");
  feature(has.second, 12, "svebf16");
  feature(has.second, 1, "sve2");
  if (has.sve_bits > 0) features.push_back("(sve of " + std::to_string(has.sve_bits) + " bits)");
#endif
  return features;
}

// Asks for huge pages where fresh memory will be written from end to end: page by page, the faults cost more than the
// writing. Advice only, about whole pages within the range; how the system follows it changes no result.
inline bool advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (address == 0 || bytes > UINTPTR_MAX - address - page) return false;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  return end > begin && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace cmdp
