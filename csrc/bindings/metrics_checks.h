// Checks that the metric bindings of every device share. Contract: widedeep/ops/metrics.py.
#pragma once
#include "bindings/checks.h"

namespace widedeep {

inline void check_auc_histogram(const Tensor& logit, const Tensor& label, const Tensor& positives,
                                const Tensor& negatives) {
  const char* op = "auc_histogram_";
  check(logit, op, "logit", ScalarType::Float, {kAny}, logit);
  check(label, op, "label", ScalarType::Float, {logit.size(0)}, logit);
  check(positives, op, "positives", ScalarType::Long, {kAny}, logit);
  check(negatives, op, "negatives", ScalarType::Long, {positives.size(0)}, logit);
  STD_TORCH_CHECK(positives.size(0) >= 1, op, ": the histogram needs at least one bin");
}

}  // namespace widedeep
