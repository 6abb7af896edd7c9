// From the ops' arguments to what the kernels take; shared by embedding_cuda.cpp and embedding_update_cuda.cpp.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "bindings/embedding_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "kernels/embedding.h"

namespace widedeep {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

inline kernels::Features features_of(const Ints& hotness, const Ints& rows, const char* op) {
  STD_TORCH_CHECK(rows.size() <= kernels::kMaxFeatures, op, ": ", rows.size(), " tables, a GPU launch takes at most ",
                  kernels::kMaxFeatures);
  kernels::Features features{};
  features.count = static_cast<int32_t>(rows.size());
  int32_t row_base = 0;
  for (size_t f = 0; f < rows.size(); ++f) {
    kernels::Feature& t = features.feature[f];
    t.first_id = features.K;
    t.hotness = static_cast<int32_t>(hotness[f]);
    t.row_base = row_base;
    t.rows = static_cast<int32_t>(rows[f]);
    features.K += t.hotness;
    row_base += t.rows;
  }
  STD_TORCH_CHECK(features.K <= 4096, op, ": ", features.K, " id columns, a GPU launch takes at most 4096");
  return features;
}

inline void place(kernels::Features& features, const Ints& columns, const Ints& mean, const Ints& dims,
                  const char* op) {
  for (int32_t f = 0; f < features.count; ++f) {
    STD_TORCH_CHECK(dims[f] <= kernels::kMaxDim, op, ": table ", f, " has dim ", dims[f], ", a GPU takes at most ",
                    kernels::kMaxDim);
    features.feature[f].column = static_cast<int32_t>(columns[f]);
    features.feature[f].mean = static_cast<int32_t>(mean[f] != 0);
    features.feature[f].dim = static_cast<int32_t>(dims[f]);
  }
}

inline kernels::Batch batch_of(const Tensor& ids) {
  return {static_cast<const int32_t*>(ids.const_data_ptr()), ids.size(0)};
}

inline Tensor workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace widedeep
