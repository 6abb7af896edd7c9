// Embedding tables on the CPU: the forward gather, the sorting of a batch's ids into distinct rows, and the gradients
// and updates of the touched rows. Letters as in docs/architecture.md; everything is row-major and contiguous. Results
// have the same bits for any number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/ftrl.h"
#include "core/rmsprop.h"

namespace widedeep::cpu {

// One categorical feature. Its ids are `hotness` consecutive columns of ids [B, K] from first_id on, its rows of the
// flat [R] vectors start at row_base, its columns of the deep input at `column`.
struct Feature {
  int64_t first_id, hotness, row_base, rows, dim, column;
  bool mean;  // the deep part takes the mean over the valid ids of a sample; the wide part always sums
  float* table;
  float* rms;
};

struct Batch {
  const int32_t* ids;  // [B, K], -1 = padding; caller guarantees -1 <= id < rows
  int64_t B, K;
  const std::vector<Feature>& features;
};

// Position in ids of the first one outside [-1, rows), or -1.
int64_t find_bad_id(const Batch& batch);

// x [B, W] of storage type x_type: tables and numerics in their columns, zeros elsewhere.
// wide_logit [B] = sum of wide[row_base + id] + numeric . wide_numeric + wide_bias.
struct ForwardInputs {
  const float* numeric;  // [B, N]
  const float* wide;     // [R]
  const float* wide_numeric;
  float wide_bias;
  const std::vector<int64_t>& numeric_columns;
};
void embedding_forward(const Batch& batch, const ForwardInputs& in, void* x, core::DType x_type, int64_t W,
                       float* wide_logit);

// The batch's valid ids sorted by flat row (row_base + id), then by position. n = B * K is the capacity.
struct Segments {
  int32_t* unique;       // [n] distinct flat rows ascending, then -1
  int32_t* offsets;      // [n + 1] first entry of each, then the number of entries
  int32_t* entries;      // [n] position b * K + k of each id, then -1
  int32_t* keys;         // [n] its flat row, then R
  int32_t* table_start;  // [F + 1] where each table's rows start in unique
};
void embedding_segments(const Batch& batch, const Segments& out);

// False when the segments could not have come from a batch of this shape: following them would leave the arrays.
bool segments_fit(const Batch& batch, const Segments& s);

// Gradients of the touched rows, in the order of `unique`: tables[f] [min(rows, B * hotness), dim] and wide [n], zeros
// past the touched ones. dx [B, W] of storage type dx_type, dlogit [B].
struct Gradients {
  const void* dx;
  core::DType dx_type;
  int64_t W;
  const float* dlogit;
};
void embedding_row_gradients(const Batch& batch, const Segments& s, const Gradients& g,
                             const std::vector<float*>& tables, float* wide);

// RMSprop on every touched row and FTRL on its wide weight, with gradients divided by the loss scale.
struct RowUpdate {
  int32_t* last_step;  // [R]
  float *wide, *accum, *linear;
  core::RmspropRule rmsprop;
  core::FtrlRule ftrl;
  int64_t step;
  float inverse_scale;
};
void embedding_update(const Batch& batch, const Segments& s, const Gradients& g, const RowUpdate& update);

}  // namespace widedeep::cpu
