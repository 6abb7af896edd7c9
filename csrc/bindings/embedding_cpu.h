// From the ops' arguments to what the CPU loops take; shared by embedding_cpu.cpp and embedding_update_cpu.cpp.
#pragma once
#include "bindings/embedding_checks.h"
#include "bindings/pointers.h"
#include "cpu/embedding.h"

namespace widedeep {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

inline std::vector<cpu::Feature> features_of(const Ints& hotness, const Ints& rows) {
  std::vector<cpu::Feature> features;
  int64_t first_id = 0, row_base = 0;
  for (size_t f = 0; f < rows.size(); ++f) {
    features.push_back({first_id, hotness[f], row_base, rows[f], 0, 0, false, nullptr, nullptr});
    first_id += hotness[f];
    row_base += rows[f];
  }
  return features;
}

inline void place(std::vector<cpu::Feature>& features, const Ints& columns, const Ints& mean, const Ints& dims) {
  for (size_t f = 0; f < features.size(); ++f) {
    features[f].column = columns[f];
    features[f].mean = mean[f] != 0;
    features[f].dim = dims[f];
  }
}

// Every id is checked here, so that the loops need not.
inline cpu::Batch batch_of(const Tensor& ids, const std::vector<cpu::Feature>& features, const char* op) {
  const cpu::Batch batch{static_cast<const int32_t*>(ids.const_data_ptr()), ids.size(0), ids.size(1), features};
  if (const int64_t bad = cpu::find_bad_id(batch); bad >= 0) {
    size_t f = 0;
    while (bad % batch.K >= features[f].first_id + features[f].hotness) ++f;
    STD_TORCH_CHECK(false, op, ": feature ", f, " has id ", batch.ids[bad], " in batch row ", bad / batch.K,
                    ", expected -1 (padding) or 0 to ", features[f].rows - 1);
  }
  return batch;
}

}  // namespace widedeep
