// Checks that the embedding bindings of every device share. Contracts: widedeep/ops/embedding.py.
#pragma once
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "bindings/checks.h"

namespace widedeep {

// Feature lists as the ops take them, each of length F.
struct FeatureLists {
  const std::vector<int64_t>& hotness;
  const std::vector<int64_t>& rows;
  int64_t total_rows() const { return std::accumulate(rows.begin(), rows.end(), int64_t{0}); }
  int64_t id_columns() const { return std::accumulate(hotness.begin(), hotness.end(), int64_t{0}); }
};

inline void check_ids(const Tensor& ids, const FeatureLists& features, const char* op) {
  STD_TORCH_CHECK(features.hotness.size() == features.rows.size(), op, ": hotness has ", features.hotness.size(),
                  " entries for ", features.rows.size(), " tables");
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - 1;  // rows and positions travel as int32
  for (size_t f = 0; f < features.rows.size(); ++f)  // one by one: a sum of any int64 might wrap round
    STD_TORCH_CHECK(std::min(features.hotness[f], features.rows[f]) >= 1 &&
                        std::max(features.hotness[f], features.rows[f]) <= kLimit,
                    op, ": feature ", f, " has hotness ", features.hotness[f], " and ", features.rows[f],
                    " rows, both must be in [1, 2^31 - 2]");
  check(ids, op, "ids", ScalarType::Int, {kAny, features.id_columns()}, ids);
  STD_TORCH_CHECK(ids.numel() <= kLimit, op, ": ids has ", ids.numel(), " elements, the limit is 2^31 - 2");
  STD_TORCH_CHECK(features.total_rows() <= kLimit, op, ": the tables have ", features.total_rows(),
                  " rows, the limit is 2^31 - 2");
}

inline void check_columns(const std::vector<int64_t>& columns, const std::vector<int64_t>& dims,
                          const std::vector<int64_t>& mean, int64_t width, const char* op) {
  STD_TORCH_CHECK(columns.size() == dims.size() && mean.size() == dims.size(), op, ": columns and mean must have ",
                  dims.size(), " entries, one per table, got ", columns.size(), " and ", mean.size());
  for (size_t f = 0; f < dims.size(); ++f)
    // A model without a deep part has tables of no columns.
    STD_TORCH_CHECK(dims[f] == 0 || (columns[f] >= 0 && columns[f] <= width - dims[f]), op, ": table ", f, " (dim ",
                    dims[f], " at column ", columns[f], ") does not fit into ", width, " columns");
}

inline void check_segments(const Tensor& unique, const Tensor& offsets, const Tensor& entries, const Tensor& keys,
                           const Tensor& table_start, const Tensor& ids, int64_t F, const char* op) {
  check(unique, op, "unique", ScalarType::Int, {ids.numel()}, ids);
  check(offsets, op, "offsets", ScalarType::Int, {ids.numel() + 1}, ids);
  check(entries, op, "entries", ScalarType::Int, {ids.numel()}, ids);
  check(keys, op, "keys", ScalarType::Int, {ids.numel()}, ids);
  check(table_start, op, "table_start", ScalarType::Int, {F + 1}, ids);
}

// dx [B, W] in any activation type, dlogit [B] float32.
inline void check_gradients(const Tensor& dx, const Tensor& dlogit, const Tensor& ids, const char* op) {
  element_type(dx.scalar_type(), op, "dx");
  check(dx, op, "dx", dx.scalar_type(), {ids.size(0), kAny}, ids);
  check(dlogit, op, "dlogit", ScalarType::Float, {ids.size(0)}, ids);
}

// Everything that embedding_forward reads, besides the tables' place in x [B, width].
inline void check_weights(const Tensor& ids, const Tensor& numeric, const std::vector<Tensor>& tables,
                          const Tensor& wide, const Tensor& wide_numeric, const Tensor& wide_bias,
                          const std::vector<int64_t>& numeric_columns, int64_t total_rows, int64_t width,
                          const char* op) {
  const int64_t N = static_cast<int64_t>(numeric_columns.size());
  for (size_t f = 0; f < tables.size(); ++f)
    check(tables[f], op, "tables[" + std::to_string(f) + "]", ScalarType::Float, {kAny, kAny}, ids);
  check(numeric, op, "numeric", ScalarType::Float, {ids.size(0), N}, ids);
  check(wide, op, "wide", ScalarType::Float, {total_rows}, ids);
  check(wide_numeric, op, "wide_numeric", ScalarType::Float, {N}, ids);
  check(wide_bias, op, "wide_bias", ScalarType::Float, {1}, ids);
  for (int64_t column : numeric_columns)
    STD_TORCH_CHECK(column >= 0 && column < width, op, ": numeric column ", column, " does not fit into ", width,
                    " columns");
}

// What embedding_update_ writes, and the numbers it reads from the device.
inline void check_update_state(const Tensor& ids, const std::vector<Tensor>& tables, const std::vector<Tensor>& rms,
                               const Tensor& last_step, const std::array<Tensor, 3>& wide_accum_linear,
                               const std::array<Tensor, 2>& lr_step, const std::optional<Tensor>& grad_scale,
                               const std::optional<Tensor>& found_inf, const char* op) {
  STD_TORCH_CHECK(rms.size() == tables.size(), op, ": rms has ", rms.size(), " entries for ", tables.size(), " tables");
  int64_t total_rows = 0;
  for (size_t f = 0; f < tables.size(); ++f) {
    const std::string at = "[" + std::to_string(f) + "]";
    check(tables[f], op, "tables" + at, ScalarType::Float, {kAny, kAny}, ids);
    check(rms[f], op, "rms" + at, ScalarType::Float, {tables[f].size(0), tables[f].size(1)}, ids);
    total_rows += tables[f].size(0);
  }
  check(last_step, op, "last_step", ScalarType::Int, {total_rows}, ids);
  constexpr const char* kNames[] = {"wide", "accum", "linear"};
  for (int i = 0; i < 3; ++i) check(wide_accum_linear[i], op, kNames[i], ScalarType::Float, {total_rows}, ids);
  check_scalar(lr_step[0], op, "lr", ScalarType::Float, ids);
  check_scalar(lr_step[1], op, "step", ScalarType::Long, ids);
  check_scalar(grad_scale, op, "grad_scale", ScalarType::Float, ids);
  check_scalar(found_inf, op, "found_inf", ScalarType::Float, ids);
}

inline std::vector<int64_t> sizes(const std::vector<Tensor>& tables, int64_t dim, const char* op) {
  std::vector<int64_t> out;
  for (const Tensor& t : tables) {
    STD_TORCH_CHECK(t.dim() == 2, op, ": a table must be [rows, dim], got ", describe(t));
    out.push_back(t.size(dim));
  }
  return out;
}

}  // namespace widedeep
