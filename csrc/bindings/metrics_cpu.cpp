// AUC histogram on the CPU. Contract: widedeep/ops/metrics.py.
#include <torch/csrc/stable/library.h>

#include "bindings/metrics_checks.h"
#include "bindings/pointers.h"
#include "cpu/metrics.h"

namespace widedeep {
namespace {

void auc_histogram_(Tensor logit, Tensor label, Tensor positives, Tensor negatives) {
  check_auc_histogram(logit, label, positives, negatives);
  cpu::auc_histogram(values(logit), values(label), logit.size(0), longs(positives), longs(negatives),
                     positives.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) { m.impl("auc_histogram_", TORCH_BOX(&auc_histogram_)); }

}  // namespace widedeep
