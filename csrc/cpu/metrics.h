// Counts for the AUC.
#pragma once
#include <cstdint>

namespace widedeep::cpu {

// positives, negatives [bins] i64 += rows of each class by bin of their probability (core/logistic.h).
void auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                   int64_t bins);

}  // namespace widedeep::cpu
