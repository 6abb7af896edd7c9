// Binary cross-entropy on a logit, the sigmoid that its gradient needs, and the bin of a probability among AUC
// thresholds.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

WD_HOST_DEVICE inline float sigmoid(float z) {
  const float e = expf(-fabsf(z));  // never overflows
  return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// max(z, 0) - z y + log(1 + exp(-|z|))
WD_HOST_DEVICE inline float bce_with_logits(float z, float y) {
  return fmaxf(z, 0.0f) - z * y + log1pf(expf(-fabsf(z)));
}

// Keras' i-th of T thresholds as it rounds them: -1e-7, i / (T - 1), 1 + 1e-7. This gives those in the open interval
// (0, 1).
WD_HOST_DEVICE inline float auc_threshold(int64_t i, int64_t bins) {
  return static_cast<float>(static_cast<double>(i) / static_cast<double>(bins));
}

// Bin j of [0, bins), bins = T - 1, holds t_j < p <= t_{j+1}: a row counts as positive at threshold i exactly when j >=
// i. The sigmoid is taken in double and rounded, so that every device puts a row into the same bin. NaN goes to bin 0.
WD_HOST_DEVICE inline int64_t auc_bin(float logit, int64_t bins) {
  const float p = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
  if (!(p > 0.0f)) return 0;
  int64_t j = static_cast<int64_t>(ceil(static_cast<double>(p) * static_cast<double>(bins))) - 1;
  j = j < 0 ? 0 : (j >= bins ? bins - 1 : j);
  while (j > 0 && !(p > auc_threshold(j, bins))) --j;
  while (j < bins - 1 && p > auc_threshold(j + 1, bins)) ++j;
  return j;
}

}  // namespace widedeep::core
