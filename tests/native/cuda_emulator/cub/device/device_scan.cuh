#pragma once
#include "cuda_runtime.h"

namespace cub {

struct DeviceScan {
  template <typename Input, typename Output>
  static cudaError_t InclusiveSum(void* workspace, size_t& bytes, Input in, Output out, int64_t n,
                                  cudaStream_t = nullptr) {
    const size_t wanted = n + 1;
    if (!workspace) {
      bytes = wanted;
      return cudaSuccess;
    }
    if (bytes < wanted) return cudaErrorInvalidValue;
    std::memset(workspace, 0xFF, bytes);
    auto total = in[0] - in[0];
    for (int64_t i = 0; i < n; ++i) out[i] = total += in[i];
    return cudaSuccess;
  }
};

}  // namespace cub
