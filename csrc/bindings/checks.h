// What the bindings of every device check, in one wording: "<op>: <name> must be <what>, got <what>". The letters are
// those of docs/architecture.md.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/ftrl.h"

namespace widedeep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // in a shape: any size

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + (sizes[i] == kAny ? "*" : std::to_string(sizes[i]));
  return text + "]";
}

inline std::string describe(const Tensor& t) {
  return std::string(torch::headeronly::toString(t.scalar_type())) + " " + shape_text(t.sizes().data(), t.dim()) +
         (t.is_contiguous() ? "" : " (not contiguous)");
}

inline void check_device(const Tensor& t, const char* op, const std::string& name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " is on another device than the first argument");
}

// Kernels that load and store 16 bytes at a time want a matrix to start at a multiple of them, as torch's own do.
inline void check_aligned(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op, ": ", name,
                  " must start at a multiple of 16 bytes, got a view from the middle of a row");
}

// Shape, dtype, contiguity, and the device of `like`.
inline void check(const Tensor& t, const char* op, const std::string& name, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype && t.is_contiguous();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = shape.begin()[i] == kAny || shape.begin()[i] == t.size(i);
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a contiguous ", torch::headeronly::toString(dtype), " tensor ",
                  shape_text(shape.begin(), shape.size()), ", got ", describe(t));
  check_device(t, op, name, like);
}

// One element, 0-dimensional or [1]: a learning rate, a step, a flag that lives in device memory.
inline void check_scalar(const Tensor& t, const char* op, const char* name, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == dtype, op, ": ", name, " must be one ",
                  torch::headeronly::toString(dtype), ", got ", describe(t));
  check_device(t, op, name, like);
}

inline void check_scalar(const std::optional<Tensor>& t, const char* op, const char* name, ScalarType dtype,
                         const Tensor& like) {
  if (t.has_value()) check_scalar(*t, op, name, dtype, like);
}

// float32, float16 or bfloat16; anything else is refused.
inline core::DType element_type(ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": ",
                  name, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float  ? core::DType::f32
         : dtype == ScalarType::Half ? core::DType::f16
                                     : core::DType::bf16;
}

// The rule of FTRL, which divides by the rate; `name` is the rate's.
inline core::FtrlRule ftrl_rule(double lr, double l1, double l2, const char* op, const char* name = "lr") {
  const core::FtrlRule rule{static_cast<float>(lr), static_cast<float>(l1), static_cast<float>(l2)};
  STD_TORCH_CHECK(rule.lr > 0, op, ": ", name, " must be above 0 in float32, got ", lr);
  return rule;
}

// 2 round(p * 32768) must leave something to keep.
inline void check_dropout(double p, const char* op) {
  STD_TORCH_CHECK(p >= 0.0 && p * 32768.0 + 0.5 < 32768.0, op, ": p must be in [0, 1), got ", p);
}

}  // namespace widedeep
