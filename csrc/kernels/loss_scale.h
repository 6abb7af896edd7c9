// The dynamic loss scale: whether gradients are finite, and what follows for scale and count. Arithmetic: csrc/core.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

// *found_inf = 1 if one of n values is infinite or NaN, else as it was.
cudaError_t check_finite(const void* values, core::DType type, int64_t n, float* found_inf, cudaStream_t stream);

// One step of core::update_loss_scale, all in device memory.
cudaError_t loss_scale_update(float* scale, int32_t* good_steps, int64_t* updates, const float* found_inf, float growth,
                              float backoff, int64_t interval, cudaStream_t stream);

}  // namespace widedeep::kernels
