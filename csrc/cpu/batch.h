// One batch of a data set in memory: its rows in an epoch's order.
#pragma once
#include <cstdint>

#include "core/permute.h"

namespace widedeep::cpu {

// Row-major matrices of a data set: ids [rows, K], numeric [rows, N], label [rows], group [rows] or null.
struct StoredRows {
  const int32_t* ids;
  const float* numeric;
  const float* label;
  const int64_t* group;
  int64_t K, N;
};

// The same of B rows; group is null where the data set's is.
struct BatchRows {
  int32_t* ids;
  float* numeric;
  float* label;
  int64_t* group;
};

// Row b of the batch is the row at position start + b of `order`, or of the data set itself where order is null.
void gather_batch(const StoredRows& from, const core::EpochOrder* order, int64_t start, int64_t B, const BatchRows& to);

}  // namespace widedeep::cpu
