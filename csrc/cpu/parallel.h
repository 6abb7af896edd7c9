// The CPU loops' one way to use several threads. The loops know no torch: bindings/parallel_cpu.cpp hands over torch's
// pool, so that torch.set_num_threads holds for our ops too.
#pragma once
#include <cstdint>

namespace widedeep::cpu {

namespace detail {
void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
}

// Calls body(first, last) on disjoint ranges that cover [begin, end), each of at least `grain` indices where possible.
// How it is cut depends on the number of threads, so results must not: sums go into fixed chunks that are added up in
// order. body must not throw.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  detail::run_parallel(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace widedeep::cpu
