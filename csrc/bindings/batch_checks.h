// What the batch bindings of every device share: checks, and the kernels' arguments from the op's. Contract:
// widedeep/ops/batch.py.
#pragma once
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "bindings/pointers.h"
#include "core/batch.h"
#include "core/permute.h"

namespace widedeep {

using OptionalTensor = std::optional<Tensor>;

// sources, outputs: ids, numeric, label.
inline void check_gather_batch(const std::vector<Tensor>& sources, const OptionalTensor& group, int64_t start,
                               const std::vector<Tensor>& outputs, const OptionalTensor& out_group) {
  const char* op = "gather_batch_out";
  const Tensor& ids = sources[0];
  check(ids, op, "ids", ScalarType::Int, {kAny, kAny}, ids);
  const int64_t rows = ids.size(0), K = ids.size(1);
  check(sources[1], op, "numeric", ScalarType::Float, {rows, kAny}, ids);
  const int64_t N = sources[1].size(1);
  check(sources[2], op, "label", ScalarType::Float, {rows}, ids);
  check(outputs[0], op, "out_ids", ScalarType::Int, {kAny, K}, ids);
  const int64_t B = outputs[0].size(0);
  check(outputs[1], op, "out_numeric", ScalarType::Float, {B, N}, ids);
  check(outputs[2], op, "out_label", ScalarType::Float, {B}, ids);
  STD_TORCH_CHECK(group.has_value() == out_group.has_value(), op, ": expected both group and out_group, or neither");
  if (group.has_value()) {
    check(*group, op, "group", ScalarType::Long, {rows}, ids);
    check(*out_group, op, "out_group", ScalarType::Long, {B}, ids);
  }
  STD_TORCH_CHECK(K <= 1 << 24 && N <= 1 << 24, op, ": at most 2^24 columns, got ", K, " and ", N);
  STD_TORCH_CHECK(start >= 0 && start <= rows && B <= rows - start, op, ": positions [", start, ", ", start, " + ", B,
                  ") are not all within ", rows, " rows");
}

// Empty: the rows as they are stored. Otherwise block_rows, window_rows, seed, epoch.
inline std::optional<core::EpochOrder> epoch_order(const std::vector<int64_t>& order, int64_t rows) {
  if (order.empty() || rows == 0) return std::nullopt;
  STD_TORCH_CHECK(order.size() == 4, "gather_batch_out: order must be empty or block_rows, window_rows, seed, epoch");
  STD_TORCH_CHECK(order[0] >= 1 && order[0] <= core::kMostOrdered && order[1] >= 1 && order[1] <= core::kMostOrdered,
                  "gather_batch_out: block_rows and window_rows must be in [1, 2^40], got ", order[0], " and ",
                  order[1]);
  return core::EpochOrder(rows, order[0], order[1], order[2], order[3]);
}

inline core::StoredRows stored_rows(const Tensor& ids, const Tensor& numeric, const Tensor& label,
                                    const OptionalTensor& group) {
  return {static_cast<const int32_t*>(ids.const_data_ptr()),
          values(numeric),
          values(label),
          group ? static_cast<const int64_t*>(group->const_data_ptr()) : nullptr,
          ids.size(1),
          numeric.size(1)};
}

inline core::BatchRows batch_rows(const Tensor& ids, const Tensor& numeric, const Tensor& label,
                                  const OptionalTensor& group) {
  return {ints(ids), floats(numeric), floats(label),
          group ? static_cast<int64_t*>(group->mutable_data_ptr()) : nullptr};
}

}  // namespace widedeep
