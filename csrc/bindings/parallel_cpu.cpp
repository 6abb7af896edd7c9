// Hands torch's thread pool to the CPU loops.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace widedeep::cpu::detail {

void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

}  // namespace widedeep::cpu::detail
