// Dense layers on Hopper with everything that follows the product fused into it. Sums in float32; half types (f16,
// bf16), or f32, whose operands are rounded to TF32. Both products are C [M, N] = A [M, K] B [N, K]^T on row-major
// operands, so the gradient takes a transposed weight copy.
//   M any; N and K multiples of 8; operands 16-byte aligned; rows contiguous (leading dimensions N and K).
// Deterministic: a tile has one owner, sums have one order. Needs compute capability 9.0; other devices get
// cudaErrorNoKernelImageForDevice.
//
// mask: for each element of C whether y > 0 (kept by dropout and positive), one bit, in the order in which the thread
// that finishes it holds it: forward writes what the gradient into the same layer reads, both by the same tiling.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

// The dropout of one layer: threshold and scale as in core/philox.h; *step is read on the device. threshold 0: no
// dropout.
struct DropoutArgs {
  uint32_t threshold;
  float scale;
  uint64_t seed;
  const int64_t* step;
  uint32_t layer;
  uint32_t first_row;
};

struct GemmSm90 {
  int64_t M, N, K;
  core::DType dtype;
};

int64_t sm90_mask_bytes(int64_t M, int64_t N);
int64_t sm90_strips(int64_t M);

// y [M, N] = dropout(relu(x [M, K] weight [N, K]^T + bias [N])); bias in the dtype of x; mask may be null. The
// threshold must be even.
cudaError_t linear_forward_sm90(const void* x, const void* weight, const void* bias, void* y, void* mask,
                                GemmSm90 shape, DropoutArgs dropout, cudaStream_t stream);

// dx [M, N] = (dz [M, K] weight_t [N, K]^T) * (mask ? scale : 0); mask null: the plain product times scale.
// column_sums [sm90_strips(M), N] f32: the sums of dx's columns, as rounded, per strip of 128 rows; may be null.
// found_inf (half types): set to 1 where an element of dx is not finite, never to 0; may be null, and must be where
// mask is not.
cudaError_t linear_dgrad_sm90(const void* dz, const void* weight_t, const void* mask, float scale, void* dx,
                              float* column_sums, float* found_inf, GemmSm90 shape, cudaStream_t stream);

}  // namespace widedeep::kernels
