// The AUC histogram on a GPU. Contract: widedeep/ops/metrics.py.
#include <torch/csrc/stable/library.h>

#include "bindings/metrics_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "kernels/metrics.h"

namespace widedeep {
namespace {

void auc_histogram_(Tensor logit, Tensor label, Tensor positives, Tensor negatives) {
  check_auc_histogram(logit, label, positives, negatives);
  const DeviceGuard guard(logit.get_device_index());
  STD_CUDA_CHECK(kernels::auc_histogram(values(logit), values(label), logit.size(0), longs(positives), longs(negatives),
                                        positives.size(0), current_stream(logit)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) { m.impl("auc_histogram_", TORCH_BOX(&auc_histogram_)); }

}  // namespace widedeep
