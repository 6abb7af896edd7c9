// Where the rows of a data set and of a batch lie.
#pragma once
#include <cstdint>

namespace widedeep::core {

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

}  // namespace widedeep::core
