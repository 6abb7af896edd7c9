// The embedding gather and the sorting of ids on the CPU. Contracts: widedeep/ops/embedding.py.
#include "bindings/embedding_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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
  check(wide_logit, op, "wide_logit", ScalarType::Float, {ids.size(0)}, ids);
  check_columns(columns, dims, mean, x.size(1), op);
  check_weights(ids, numeric, tables, wide, wide_numeric, wide_bias, numeric_columns, lists.total_rows(), x.size(1),
                op);
  auto features = features_of(hotness, rows);
  place(features, columns, mean, dims);
  for (size_t f = 0; f < features.size(); ++f) features[f].table = const_cast<float*>(values(tables[f]));
  const cpu::ForwardInputs in{values(numeric), values(wide), values(wide_numeric), *values(wide_bias), numeric_columns};
  cpu::embedding_forward(batch_of(ids, features, op), in, x.mutable_data_ptr(), type, x.size(1), floats(wide_logit));
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
  check_ids(ids, {hotness, rows}, op);
  const int64_t n = ids.numel(), F = static_cast<int64_t>(rows.size());
  const auto features = features_of(hotness, rows);
  const cpu::Batch batch = batch_of(ids, features, op);
  Tensor unique = torch::stable::new_empty(ids, {n}), offsets = torch::stable::new_empty(ids, {n + 1});
  Tensor entries = torch::stable::new_empty(ids, {n}), keys = torch::stable::new_empty(ids, {n});
  Tensor table_start = torch::stable::new_empty(ids, {F + 1});
  cpu::embedding_segments(batch, {ints(unique), ints(offsets), ints(entries), ints(keys), ints(table_start)});
  return {unique, offsets, entries, keys, table_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
  m.impl("embedding_forward_out", TORCH_BOX(&embedding_forward_out));
  m.impl("embedding_segments", TORCH_BOX(&embedding_segments));
}

}  // namespace widedeep
