// Spreads independent items over threads. Without OpenMP there is one thread.
#pragma once

#include <cstdint>

namespace cmdp {

// Calls body(i) for i in [0, items). Items are handed out `grain` at a time, so that a thread that another process
// slows down does not hold up the others. No result may depend on which thread did which item.
template <class Body>
void parallel_for(int64_t items, int threads, int64_t grain, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain)
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
#endif
  (void)threads, (void)grain;
  for (int64_t i = 0; i < items; ++i) body(i);
}

}  // namespace cmdp
