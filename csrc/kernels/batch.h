// One batch of a data set that lies in device memory: its rows in an epoch's order, in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/batch.h"
#include "core/permute.h"

namespace widedeep::kernels {

using core::BatchRows;
using core::StoredRows;

// Row b of the batch is the row at position start + b of `order`, or of the data set itself where order is null.
// Bytes: 2 x 4 (K + N + 1) B, + 16 B with groups; what is read comes in whole 32-byte sectors.
cudaError_t gather_batch(const StoredRows& from, const core::EpochOrder* order, int64_t start, int64_t B,
                         const BatchRows& to, cudaStream_t stream);

}  // namespace widedeep::kernels
