// The output layer, its loss and the gradients in one pass over the last hidden activation; the gradient of the wide
// numerics. h [B, H] row-major in any dtype of core/dtype.h, H at most kMaxHead; fastest where it is a multiple of 8.
// Deterministic for one device: every sum has a fixed order.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

constexpr int64_t kMaxRagged = 1024;  // past it H must be a multiple of 8
constexpr int64_t kMaxHead = 2048;    // a warp holds two sums in registers

struct HeadInputs {
  const void* h;
  core::DType type;
  int64_t B, H;
  const float *weight, *bias, *wide_logit;  // [H], [1], [B]
};

// logit [B] = h . weight + bias + wide_logit. Bytes: one read of h.
cudaError_t head_forward(const HeadInputs& in, float* logit, cudaStream_t stream);

// Contract of every field: widedeep/ops/head.py; dz may be h. Bytes: one read of h, one write of dz.
struct HeadStep {
  const float* label;
  int64_t global_rows;
  const float* loss_scale;  // null: 1
  float kept_scale;
  float *logit, *dlogit;
  void* dz;
  float *dbias_hidden, *dweight, *dbias, *loss;
};
size_t head_workspace(int64_t H);
cudaError_t head_step(const HeadInputs& in, const HeadStep& out, void* workspace, cudaStream_t stream);

// dweight [N] = dlogit [B] . numeric [B, N], dbias [1] = the sum of dlogit; N at most kMaxWideNumeric. Bytes: one read
// of both.
constexpr int64_t kMaxWideNumeric = 256;
size_t wide_numeric_workspace(int64_t N);
cudaError_t wide_numeric_backward(const float* numeric, const float* dlogit, int64_t B, int64_t N, float* dweight,
                                  float* dbias, void* workspace, cudaStream_t stream);

}  // namespace widedeep::kernels
