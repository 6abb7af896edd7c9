// The passes around a plain matrix product, where they are not fused into it. [M, N] row-major, rows contiguous, any
// dtype of core/dtype.h; pointers 16-byte aligned; fastest where N is a multiple of 8. One read and one write of the
// matrix: 4 M N bytes in half types.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "kernels/dropout.h"

namespace widedeep::kernels {

// y = dropout(relu(y + bias)), in place; bias [N] in the dtype of y, null: none. threshold 0: no dropout.
// bits: whether y > 0, as core/bits.h says; null: not wanted.
cudaError_t bias_relu_dropout(void* y, const void* bias, uint32_t* bits, int64_t M, int64_t N, core::DType dtype,
                              DropoutArgs dropout, cudaStream_t stream);

// What is kept: elements whose value is > 0, or whose bit is set; at most one of the two is given.
struct Mask {
  const void* values;   // [M, N] in the dtype of what is masked, or null
  const uint8_t* bits;  // as core/bits.h says, or null
};

// out = in * (kept ? scale : 0), in == out allowed; without a mask scale alone.
// sums [mask_strips(M), N] f32: the columns' sums over each strip of rows, in fixed order; null: not wanted.
cudaError_t mask_and_sum(const void* in, const Mask& mask, float scale, void* out, float* sums, int64_t M, int64_t N,
                         core::DType dtype, cudaStream_t stream);
int64_t mask_strips(int64_t M);

// out [N] = the sum of sums [strips, N] over the strips, in fixed order. strips == 0 writes zeros.
struct StripSums {
  const float* sums;
  float* out;
  int64_t N;
};
constexpr int kStripSums = 8;  // in one launch at most

cudaError_t add_strips(const StripSums* list, int count, int64_t strips, cudaStream_t stream);

}  // namespace widedeep::kernels
