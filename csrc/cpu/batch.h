// One batch of a data set in memory: its rows in an epoch's order.
#pragma once
#include <cstdint>

#include "core/batch.h"
#include "core/permute.h"

namespace widedeep::cpu {

using core::BatchRows;
using core::StoredRows;

// Row b of the batch is the row at position start + b of `order`, or of the data set itself where order is null.
void gather_batch(const StoredRows& from, const core::EpochOrder* order, int64_t start, int64_t B, const BatchRows& to);

}  // namespace widedeep::cpu
