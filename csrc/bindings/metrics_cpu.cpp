// AUC histogram and epoch order on the CPU. Contracts: widedeep/ops/metrics.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/head_checks.h"
#include "cpu/head.h"

namespace widedeep {
namespace {

void auc_histogram_(Tensor logit, Tensor label, Tensor positives, Tensor negatives) {
  check_auc_histogram(logit, label, positives, negatives);
  cpu::auc_histogram(static_cast<const float*>(logit.const_data_ptr()),
                     static_cast<const float*>(label.const_data_ptr()), logit.size(0),
                     static_cast<int64_t*>(positives.mutable_data_ptr()),
                     static_cast<int64_t*>(negatives.mutable_data_ptr()), positives.size(0));
}

Tensor shuffle_rows(int64_t rows, int64_t block_rows, int64_t window_rows, int64_t seed, int64_t epoch, int64_t start,
                    int64_t count, torch::stable::Device device) {
  check_epoch(rows, block_rows, window_rows, start, count);
  Tensor out = torch::stable::empty({count}, ScalarType::Long, std::nullopt, device);
  STD_TORCH_CHECK(out.is_cpu(), "shuffle_rows: the CPU implementation was asked for another device");
  if (count > 0)
    cpu::shuffle_rows({rows, block_rows, window_rows, seed, epoch}, start, count,
                      static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("auc_histogram_", TORCH_BOX(&auc_histogram_));
  m.impl("shuffle_rows", TORCH_BOX(&shuffle_rows));
}

}  // namespace widedeep
