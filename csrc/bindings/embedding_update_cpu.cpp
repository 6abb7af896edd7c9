// Gradients and updates of the touched rows on the CPU. Contracts: widedeep/ops/embedding.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "bindings/embedding_cpu.h"

namespace widedeep {
namespace {

cpu::Segments segments_of(const Tensor& unique, const Tensor& offsets, const Tensor& entries, const Tensor& keys,
                          const Tensor& table_start, const cpu::Batch& batch, const char* op) {
  const auto read = [](const Tensor& t) {
    return const_cast<int32_t*>(static_cast<const int32_t*>(t.const_data_ptr()));
  };
  const cpu::Segments s{read(unique), read(offsets), read(entries), read(keys), read(table_start)};
  STD_TORCH_CHECK(cpu::segments_fit(batch, s), op,
                  ": unique, offsets, entries, keys and table_start are not those of this batch");
  return s;
}

std::tuple<Tensors, Tensor> embedding_row_gradients(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets,
                                                    Tensor entries, Tensor keys, Tensor table_start, Ints hotness,
                                                    Ints mean, Ints columns, Ints rows, Ints dims) {
  const char* op = "embedding_row_gradients";
  const int64_t F = static_cast<int64_t>(rows.size());
  check_ids(ids, {hotness, rows}, op);
  check_gradients(dx, dlogit, ids, op);
  STD_TORCH_CHECK(dims.size() == rows.size(), op, ": dims and rows must have one length");
  check_columns(columns, dims, mean, dx.size(1), op);
  check_segments(unique, offsets, entries, keys, table_start, ids, F, op);
  auto features = features_of(hotness, rows);
  place(features, columns, mean, dims);
  const cpu::Batch batch = batch_of(ids, features, op);
  const auto s = segments_of(unique, offsets, entries, keys, table_start, batch, op);
  Tensors tables;
  std::vector<float*> pointers;
  for (int64_t f = 0; f < F; ++f) {
    const int64_t capacity = std::min(rows[f], batch.B * hotness[f]);
    tables.push_back(torch::stable::new_empty(dlogit, {capacity, dims[f]}));
    pointers.push_back(floats(tables.back()));
  }
  Tensor wide = torch::stable::new_empty(dlogit, {ids.numel()});
  cpu::embedding_row_gradients(
      batch, s, {dx.const_data_ptr(), element_type(dx.scalar_type(), op, "dx"), dx.size(1), values(dlogit)}, pointers,
      floats(wide));
  return {tables, wide};
}

void embedding_update_(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets, Tensor entries, Tensor keys,
                       Tensor table_start, Tensors tables, Tensors rms, Tensor last_step, Tensor wide, Tensor accum,
                       Tensor linear, Ints hotness, Ints mean, Ints columns, Tensor lr, Tensor step, double rho,
                       double eps, double wide_lr, double l1, double l2, std::optional<Tensor> grad_scale,
                       std::optional<Tensor> found_inf) {
  const char* op = "embedding_update_";
  const Ints rows = sizes(tables, 0, op), dims = sizes(tables, 1, op);
  const FeatureLists lists{hotness, rows};
  check_ids(ids, lists, op);
  check_gradients(dx, dlogit, ids, op);
  check_columns(columns, dims, mean, dx.size(1), op);
  check_segments(unique, offsets, entries, keys, table_start, ids, static_cast<int64_t>(rows.size()), op);
  check_update_state(ids, tables, rms, last_step, {wide, accum, linear}, {lr, step}, grad_scale, found_inf, op);
  const core::FtrlRule rule = ftrl_rule(wide_lr, l1, l2, op, "wide_lr");
  auto features = features_of(hotness, rows);
  place(features, columns, mean, dims);
  for (size_t f = 0; f < features.size(); ++f) {
    features[f].table = floats(tables[f]);
    features[f].rms = floats(rms[f]);
  }
  const cpu::Batch batch = batch_of(ids, features, op);
  const auto s = segments_of(unique, offsets, entries, keys, table_start, batch, op);
  if (found_inf.has_value() && *values(*found_inf) != 0.0f) return;
  const cpu::RowUpdate update{ints(last_step),
                              floats(wide),
                              floats(accum),
                              floats(linear),
                              {*values(lr), static_cast<float>(rho), static_cast<float>(eps)},
                              rule,
                              *step_of(step),
                              grad_scale.has_value() ? 1.0f / *values(*grad_scale) : 1.0f};
  cpu::embedding_update(
      batch, s, {dx.const_data_ptr(), element_type(dx.scalar_type(), op, "dx"), dx.size(1), values(dlogit)}, update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("embedding_row_gradients", TORCH_BOX(&embedding_row_gradients));
  m.impl("embedding_update_", TORCH_BOX(&embedding_update_));
}

}  // namespace widedeep
