// The memory of a tensor whose dtype has been checked: `values` to read, what is named after the type to write.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace widedeep {

inline const float* values(const torch::stable::Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
// Null where there is no tensor.
inline const float* values(const std::optional<torch::stable::Tensor>& t) { return t ? values(*t) : nullptr; }

inline float* floats(const torch::stable::Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline float* floats(const std::optional<torch::stable::Tensor>& t) { return t ? floats(*t) : nullptr; }
inline int32_t* ints(const torch::stable::Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
inline int64_t* longs(const torch::stable::Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

// What counts steps, to read.
inline const int64_t* step_of(const torch::stable::Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

}  // namespace widedeep
