// The module's questions to the machine it runs on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cmdp {

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
