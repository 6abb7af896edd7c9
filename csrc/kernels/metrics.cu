#include "core/logistic.h"
#include "kernels/common.cuh"
#include "kernels/metrics.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    auc_histogram_kernel(const float* __restrict__ logit, const float* __restrict__ label, int64_t B,
                         unsigned long long* positives, unsigned long long* negatives, int64_t bins) {
  for (int64_t b = global_thread(); b < B; b += grid_threads())
    atomicAdd((label[b] > 0.5f ? positives : negatives) + core::auc_bin(logit[b], bins),
              1ull);  // whole numbers: any order
}

}  // namespace

cudaError_t auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                          int64_t bins, cudaStream_t stream) {
  if (B == 0) return cudaSuccess;
  auc_histogram_kernel<<<grid_for(B, kThreads), kThreads, 0, stream>>>(
      logit, label, B, reinterpret_cast<unsigned long long*>(positives),
      reinterpret_cast<unsigned long long*>(negatives), bins);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
