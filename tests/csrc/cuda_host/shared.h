// Where the `__shared__` variables of this module lie.
//
// `__shared__` stands for `static __thread`: such variables lie together, in a range that the dynamic linker knows, and
// all threads of a grid run in one system thread. A launch may therefore fill the range before every block and exchange
// it when another block goes on. Other variables that lie there (pybind11's own) are put back when the launch ends.
#pragma once

#include <link.h>

#include <cstddef>
#include <stdexcept>

#define __shared__ static __thread

namespace cuda_host {

struct Range {
  char* data = nullptr;
  size_t size = 0;
  bool holds(const void* p) const { return p >= data && p < data + size; }
};

inline __thread char shared_marker;

inline Range shared_range() {
  *const_cast<volatile char*>(&shared_marker) = 0;  // the storage is made when it is first touched
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* result) {
        const char* begin = static_cast<const char*>(module->dlpi_tls_data);
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const size_t size = module->dlpi_phdr[i].p_memsz;
          if (module->dlpi_phdr[i].p_type != PT_TLS || begin == nullptr) continue;
          if (&shared_marker < begin || &shared_marker >= begin + size) continue;
          *static_cast<Range*>(result) = {static_cast<char*>(module->dlpi_tls_data), size};
          return 1;
        }
        return 0;
      },
      &range);
  if (range.data == nullptr) throw std::runtime_error("the shared variables of this module were not found");
  return range;
}

}  // namespace cuda_host
