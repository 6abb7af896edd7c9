// Embedding tables on a GPU: the gather of all tables in one launch, the sorting of a batch's ids, and the gradients
// and updates of the touched rows. Letters as in docs/architecture.md; everything row-major and contiguous; B == 0 is a
// no-op. Deterministic: the order of every sum is fixed by the batch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/ftrl.h"

namespace widedeep::kernels {

// One categorical feature. Its ids are `hotness` consecutive columns of ids [B, K] from first_id on, its rows of the
// flat [R] vectors start at row_base, its columns of the deep input at `column`. mean: the deep part takes the mean
// over the valid ids.
struct Feature {
  float* table;  // [rows, dim]
  float* rms;    // [rows, dim]; only the update reads it
  int32_t first_id, hotness, row_base, rows, dim, column, mean;
};

// Travels as a kernel parameter, so that a captured launch needs no table of pointers in device memory.
constexpr int kMaxFeatures = 256, kMaxNumeric = 256, kMaxDim = 256;
struct Features {
  int32_t count, K;
  Feature feature[kMaxFeatures];
};

struct Numerics {
  int32_t count;
  int32_t column[kMaxNumeric];
};

struct Batch {
  const int32_t* ids;  // [B, K]; below 0: padding; else a row: the forward pass traps on one past its table
  int64_t B;
};

// x [B, W] of x_type: tables and numerics in their columns, zeros elsewhere.
// wide_logit [B] = sum of wide [R] at row_base + id, + numeric [B, N] . wide_numeric [N] + wide_bias [1].
// Bytes: the touched rows, 4 B (K + N), sizeof(x_type) B W.
struct ForwardTensors {
  const float *numeric, *wide, *wide_numeric, *wide_bias;
  void* x;
  core::DType x_type;
  int64_t W;
  float* wide_logit;
};
cudaError_t embedding_forward(const Batch& batch, const Features& features, const Numerics& numerics,
                              const ForwardTensors& tensors, cudaStream_t stream);

// Valid ids sorted by flat row (row_base + id), then by position. n = B K, rows = R.
struct Segments {
  int32_t* unique;       // [n] distinct flat rows ascending, then -1
  int32_t* offsets;      // [n + 1] first entry of each, then the number of entries
  int32_t* entries;      // [n] position b K + k of each id, then -1
  int32_t* keys;         // [n] its flat row, then R
  int32_t* table_start;  // [F + 1] where each table's rows start in unique
};
size_t segments_workspace(int64_t n, int64_t rows);
cudaError_t embedding_segments(const Batch& batch, const Features& features, int64_t rows, const Segments& out,
                               void* workspace, cudaStream_t stream);

// What the two backward passes read: dx [B, W] of dx_type, dlogit [B]; both divided by *grad_scale when it is not null.
struct Gradients {
  const void* dx;
  core::DType dx_type;
  int64_t W;
  const float* dlogit;
  const float* grad_scale;
};
size_t backward_workspace(int64_t n, const Features& features);

// RMSprop on every touched row and FTRL on its wide weight. *found_inf != 0 (when not null) makes it a no-op.
struct RowUpdate {
  int32_t* last_step;  // [R]
  float *wide, *accum, *linear;
  const float* lr;
  const int64_t* step;
  const float* found_inf;
  float rho, eps;
  core::FtrlRule ftrl;
};
cudaError_t embedding_update(const Batch& batch, const Features& features, const Segments& segments,
                             const Gradients& gradients, const RowUpdate& update, void* workspace, cudaStream_t stream);

// Gradients of the touched rows in the order of unique: rows[f] [min(rows, B hotness), dim] as the features' `table`,
// and wide [n]. Places without a row are left as they are.
cudaError_t embedding_row_gradients(const Batch& batch, const Features& features, const Segments& segments,
                                    const Gradients& gradients, float* wide, void* workspace, cudaStream_t stream);

}  // namespace widedeep::kernels
