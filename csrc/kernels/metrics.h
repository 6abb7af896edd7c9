// Counts for the AUC. Arithmetic: csrc/core/logistic.h.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace widedeep::kernels {

// positives, negatives [bins] += rows of each class by bin of their probability.
cudaError_t auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                          int64_t bins, cudaStream_t stream);

}  // namespace widedeep::kernels
