// Gradients and updates of the touched rows on a GPU. Contracts: widedeep/ops/embedding.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bindings/embedding_cuda.h"

namespace widedeep {
namespace {

kernels::Segments segments_of(const Tensor& unique, const Tensor& offsets, const Tensor& entries, const Tensor& keys,
                              const Tensor& table_start) {
  const auto read = [](const Tensor& t) {
    return const_cast<int32_t*>(static_cast<const int32_t*>(t.const_data_ptr()));
  };
  return {read(unique), read(offsets), read(entries), read(keys), read(table_start)};
}

kernels::Gradients gradients_of(const Tensor& dx, const Tensor& dlogit, const float* grad_scale, const char* op) {
  return {dx.const_data_ptr(), element_type(dx.scalar_type(), op, "dx"), dx.size(1), values(dlogit), grad_scale};
}

std::tuple<Tensors, Tensor> embedding_row_gradients(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets,
                                                    Tensor entries, Tensor keys, Tensor table_start, Ints hotness,
                                                    Ints mean, Ints columns, Ints rows, Ints dims) {
  const char* op = "embedding_row_gradients";
  check_ids(ids, {hotness, rows}, op);
  check_gradients(dx, dlogit, ids, op);
  STD_TORCH_CHECK(dims.size() == rows.size(), op, ": dims and rows must have one length");
  check_columns(columns, dims, mean, dx.size(1), op);
  check_segments(unique, offsets, entries, keys, table_start, ids, static_cast<int64_t>(rows.size()), op);
  auto features = features_of(hotness, rows, op);
  place(features, columns, mean, dims, op);
  const DeviceGuard guard(ids.get_device_index());
  Tensors tables;
  for (size_t f = 0; f < rows.size(); ++f) {
    const int64_t capacity = std::min(rows[f], ids.size(0) * hotness[f]);
    tables.push_back(torch::stable::new_zeros(dlogit, {capacity, dims[f]}));
    features.feature[f].table = floats(tables.back());
  }
  Tensor wide = torch::stable::new_zeros(dlogit, {ids.numel()});
  const Tensor memory = workspace(ids, kernels::backward_workspace(ids.numel(), features));
  STD_CUDA_CHECK(kernels::embedding_row_gradients(
      batch_of(ids), features, segments_of(unique, offsets, entries, keys, table_start),
      gradients_of(dx, dlogit, nullptr, op), floats(wide), memory.mutable_data_ptr(), current_stream(ids)));
  return {tables, wide};
}

void embedding_update_(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets, Tensor entries, Tensor keys,
                       Tensor table_start, Tensors tables, Tensors rms, Tensor last_step, Tensor wide, Tensor accum,
                       Tensor linear, Ints hotness, Ints mean, Ints columns, Tensor lr, Tensor step, double rho,
                       double eps, double wide_lr, double l1, double l2, std::optional<Tensor> grad_scale,
                       std::optional<Tensor> found_inf) {
  const char* op = "embedding_update_";
  const Ints rows = sizes(tables, 0, op), dims = sizes(tables, 1, op);
  check_ids(ids, {hotness, rows}, op);
  check_gradients(dx, dlogit, ids, op);
  check_columns(columns, dims, mean, dx.size(1), op);
  check_segments(unique, offsets, entries, keys, table_start, ids, static_cast<int64_t>(rows.size()), op);
  check_update_state(ids, tables, rms, last_step, {wide, accum, linear}, {lr, step}, grad_scale, found_inf, op);
  const core::FtrlRule rule = ftrl_rule(wide_lr, l1, l2, op, "wide_lr");
  auto features = features_of(hotness, rows, op);
  place(features, columns, mean, dims, op);
  for (size_t f = 0; f < rows.size(); ++f) {
    features.feature[f].table = floats(tables[f]);
    features.feature[f].rms = floats(rms[f]);
  }
  const DeviceGuard guard(ids.get_device_index());
  const kernels::RowUpdate update{
      ints(last_step), floats(wide),      floats(accum),           floats(linear),          values(lr),
      step_of(step),   values(found_inf), static_cast<float>(rho), static_cast<float>(eps), rule};
  const Tensor memory = workspace(ids, kernels::backward_workspace(ids.numel(), features));
  STD_CUDA_CHECK(kernels::embedding_update(
      batch_of(ids), features, segments_of(unique, offsets, entries, keys, table_start),
      gradients_of(dx, dlogit, values(grad_scale), op), update, memory.mutable_data_ptr(), current_stream(ids)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("embedding_row_gradients", TORCH_BOX(&embedding_row_gradients));
  m.impl("embedding_update_", TORCH_BOX(&embedding_update_));
}

}  // namespace widedeep
