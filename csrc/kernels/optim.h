// Optimizer rules on whole tensors (one launch for a list of them) and on listed rows. Arithmetic: csrc/core.
// Deterministic.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/ftrl.h"

namespace widedeep::kernels {

// A weight [rows, columns] with its mean square; the gradient and the copy may have wider rows (padding, which is
// skipped on reading and stays as it is on writing). A vector is one row.
struct DenseParameter {
  float *weight, *rms;
  const void* grad;
  void* copy;  // the new weight in copy_type; null: none
  int64_t rows, columns, grad_pitch, copy_pitch;
  core::DType grad_type, copy_type;
};

// Scalars in device memory: lr, 1 / *grad_scale (null: 1), *found_inf != 0 (null: never) makes the call a no-op.
struct DenseScalars {
  const float *lr, *grad_scale, *found_inf;
  float rho, eps;
};
cudaError_t rmsprop_dense(const DenseParameter* parameters, int count, const DenseScalars& scalars,
                          cudaStream_t stream);

cudaError_t ftrl_dense(float* weight, float* accum, float* linear, const float* grad, int64_t n, core::FtrlRule rule,
                       const float* grad_scale, const float* found_inf, cudaStream_t stream);

// A sparse gradient of a table: rows [n], -1 skipped, and grads [n, D]. sort_rows makes a stable order of it, in which
// equal rows are then added, in the order listed; one warp adds the rows of one name, so a name listed often is slow
// here.
struct ListedRows {
  const uint32_t* sorted;  // [n], skipped ones last, as R
  const int32_t* order;    // [n], place in grads
  const float* grads;
  int64_t n, D, R;
};
size_t sort_rows_workspace(int64_t n, int64_t R);
cudaError_t sort_rows(const int64_t* rows, int64_t n, int64_t R, uint32_t* sorted, int32_t* order, void* workspace,
                      cudaStream_t stream);
cudaError_t rmsprop_rows(float* weight, float* rms, int32_t* last_step, const ListedRows& rows, const float* lr,
                         const int64_t* step, float rho, float eps, cudaStream_t stream);
cudaError_t ftrl_rows(float* weight, float* accum, float* linear, const ListedRows& rows, core::FtrlRule rule,
                      cudaStream_t stream);
// rms of every row brought to `step`.
cudaError_t rmsprop_settle(float* rms, int32_t* last_step, int64_t rows, int64_t D, const int64_t* step, float rho,
                           cudaStream_t stream);

}  // namespace widedeep::kernels
