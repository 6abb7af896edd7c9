// Rows of a shard set, which is stored column by column, made rows of matrices.
#pragma once
#include <cstdint>
#include <vector>

#include "core/batch.h"

namespace widedeep::cpu {

// As docs/architecture.md says of shards: ids unsigned, the type's maximum = padding; numerics halves or floats.
enum class Stored { u8, u16, u32, f16, f32, i64 };

struct StoredColumn {
  std::vector<const void*> parts;  // [rows of the part, width] of each part
  Stored type;
  int64_t width;
};

struct StoredColumns {
  std::vector<StoredColumn> ids, numeric;  // in the order of the matrices' columns; K and N are the sums of widths
  StoredColumn label, group;               // group: without parts where there is none
  std::vector<int64_t> ends;               // part p has the rows from ends[p - 1] (0 for the first) to ends[p]
};

// Row rows[i] goes to row slots[i] of `to` (null: to row i). Fastest for ascending rows; any order is right. Caller
// guarantees 0 <= rows[i] < ends.back(), and that slots fit `to`.
void assemble_rows(const StoredColumns& from, const int64_t* rows, const int64_t* slots, int64_t count,
                   const core::BatchRows& to);

}  // namespace widedeep::cpu
