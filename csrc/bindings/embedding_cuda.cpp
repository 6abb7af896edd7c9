// The embedding gather and the sorting of ids on a GPU. Contracts: widedeep/ops/embedding.py.
#include "bindings/embedding_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace widedeep {
namespace {

void embedding_forward_out(Tensor ids, Tensor numeric, Tensors tables, Tensor wide, Tensor wide_numeric,
                           Tensor wide_bias, Ints hotness, Ints mean, Ints columns, Ints numeric_columns, Tensor x,
                           Tensor wide_logit) {
  const char* op = "embedding_forward";
  const Ints rows = sizes(tables, 0, op), dims = sizes(tables, 1, op);
  const FeatureLists lists{hotness, rows};
  const auto type = element_type(x.scalar_type(), op, "x");
  check_ids(ids, lists, op);
  check(x, op, "x", x.scalar_type(), {ids.size(0), kAny}, ids);
  check_aligned(x, op, "x");
  check(wide_logit, op, "wide_logit", ScalarType::Float, {ids.size(0)}, ids);
  check_columns(columns, dims, mean, x.size(1), op);
  check_weights(ids, numeric, tables, wide, wide_numeric, wide_bias, numeric_columns, lists.total_rows(), x.size(1),
                op);
  STD_TORCH_CHECK(numeric_columns.size() <= kernels::kMaxNumeric, op, ": ", numeric_columns.size(),
                  " numeric features, a GPU launch takes at most ", kernels::kMaxNumeric);
  auto features = features_of(hotness, rows, op);
  place(features, columns, mean, dims, op);
  for (size_t f = 0; f < tables.size(); ++f) features.feature[f].table = const_cast<float*>(values(tables[f]));
  kernels::Numerics numerics{};
  numerics.count = static_cast<int32_t>(numeric_columns.size());
  for (int32_t n = 0; n < numerics.count; ++n) numerics.column[n] = static_cast<int32_t>(numeric_columns[n]);
  const DeviceGuard guard(ids.get_device_index());
  const kernels::ForwardTensors forward{values(numeric),   values(wide),         values(wide_numeric),
                                        values(wide_bias), x.mutable_data_ptr(), type,
                                        x.size(1),         floats(wide_logit)};
  STD_CUDA_CHECK(kernels::embedding_forward(batch_of(ids), features, numerics, forward, current_stream(ids)));
}

std::tuple<Tensor, Tensor> embedding_forward(Tensor ids, Tensor numeric, Tensors tables, Tensor wide,
                                             Tensor wide_numeric, Tensor wide_bias, Ints hotness, Ints mean,
                                             Ints columns, Ints numeric_columns, int64_t width, ScalarType dtype,
                                             bool /*sparse: of the gradients*/) {
  STD_TORCH_CHECK(ids.dim() == 2 && width >= 0, "embedding_forward: ids must be [B, K] and width >= 0, got ",
                  describe(ids), " and ", width);
  Tensor x = torch::stable::new_empty(numeric, {ids.size(0), width}, dtype);
  Tensor wide_logit = torch::stable::new_empty(numeric, {ids.size(0)}, ScalarType::Float);
  embedding_forward_out(ids, numeric, tables, wide, wide_numeric, wide_bias, hotness, mean, columns, numeric_columns, x,
                        wide_logit);
  return {x, wide_logit};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_segments(Tensor ids, Ints hotness, Ints rows) {
  const char* op = "embedding_segments";
  const FeatureLists lists{hotness, rows};
  check_ids(ids, lists, op);
  const int64_t n = ids.numel(), F = static_cast<int64_t>(rows.size());
  const auto features = features_of(hotness, rows, op);
  const DeviceGuard guard(ids.get_device_index());
  Tensor unique = torch::stable::new_empty(ids, {n}), offsets = torch::stable::new_empty(ids, {n + 1});
  Tensor entries = torch::stable::new_empty(ids, {n}), keys = torch::stable::new_empty(ids, {n});
  Tensor table_start = torch::stable::new_empty(ids, {F + 1});
  const Tensor memory = workspace(ids, n > 0 ? kernels::segments_workspace(n, lists.total_rows()) : 0);
  STD_CUDA_CHECK(
      kernels::embedding_segments(batch_of(ids), features, lists.total_rows(),
                                  {ints(unique), ints(offsets), ints(entries), ints(keys), ints(table_start)},
                                  memory.mutable_data_ptr(), current_stream(ids)));
  return {unique, offsets, entries, keys, table_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
  m.impl("embedding_forward_out", TORCH_BOX(&embedding_forward_out));
  m.impl("embedding_segments", TORCH_BOX(&embedding_segments));
}

}  // namespace widedeep
