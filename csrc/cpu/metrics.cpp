#include "cpu/metrics.h"

#include "core/logistic.h"

namespace widedeep::cpu {

void auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                   int64_t bins) {
  for (int64_t b = 0; b < B; ++b) ++(label[b] > 0.5f ? positives : negatives)[core::auc_bin(logit[b], bins)];
}

}  // namespace widedeep::cpu
