// Dense layers on Hopper with everything that follows the product fused into it. Sums in float32; half types (f16,
// bf16), or f32, whose operands are rounded to TF32. Both products are C [M, N] = A [M, K] B [N, K]^T on row-major
// operands, so the gradient takes a transposed weight copy.
//   M any; N and K multiples of 8; operands 16-byte aligned; rows contiguous (leading dimensions N and K).
// Deterministic: a tile has one owner, sums have one order. Needs compute capability 9.0 and code for sm_90a; other
// devices and builds get cudaErrorNoKernelImageForDevice.
//
// mask: for each element of C whether y > 0 (kept by dropout and positive), a bit, in the order in which the thread
// that finishes it holds it (gemm_sm90_bits.cuh): forward writes it, the gradient into the same layer reads it.
// sm90_mask_bytes.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "kernels/dropout.h"

namespace widedeep::kernels {

constexpr int kSm90Links = 8;  // of a chain at most

// A layer forward: y [M, N] = dropout(relu(x weight [N, K]^T + bias [N])); bias in the dtype of x. mask null: not
// wanted.
struct ForwardSm90 {
  int64_t N;
  const void *weight, *bias;
  void *y, *mask;
};

// A layer's gradient: dx [M, N] = (dz weight_t [N, K]^T) * (mask ? scale : 0); mask null: the plain product.
// column_sums [sm90_strips(M), N] f32: the sums of dx's columns, per strip of 128 rows; may be null, and must be where
// mask is. Of half types four rows each are added in that type, then in float32: of at most a quarter of the type's
// range.
struct GradientSm90 {
  int64_t N;
  const void *weight_t, *mask;
  void* dx;
  float* column_sums;
};

// Of a chain: tiles of every cluster between what a layer writes and what the next one reads of it. With fewer it lies
// in the L2 cache still, with more nobody waits. Results do not depend on it.
constexpr int kMostRounds = 1024;

int64_t sm90_mask_bytes(int64_t M, int64_t N);
int64_t sm90_strips(int64_t M);

// Bytes that a chain of `links` needs for its own use; none for one.
int64_t sm90_workspace(int64_t M, int links);

// One launch for the layers in `links`, 1 to kSm90Links: each takes the y of the one before, the first x [M, K]. A tile
// begins when the rows that it reads are finished; the results are, bit for bit, those of a launch for each.
// dropout: of the first layer, the following ones count on from it; threshold 0: none.
cudaError_t linear_forward_sm90(const void* x, int64_t M, int64_t K, core::DType dtype, const ForwardSm90* links,
                                int count, DropoutArgs dropout, int rounds_ahead, void* workspace, cudaStream_t stream);

// The same for gradients: each takes the dx of the one before, the first dz [M, K]. scale: of what a mask keeps.
// found_inf (half types): set to 1 where an element of a dx without a mask is not finite, never to 0; may be null.
cudaError_t linear_dgrad_sm90(const void* dz, int64_t M, int64_t K, core::DType dtype, const GradientSm90* links,
                              int count, float scale, float* found_inf, int rounds_ahead, void* workspace,
                              cudaStream_t stream);

}  // namespace widedeep::kernels
