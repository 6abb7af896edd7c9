// Checks that the optimizer bindings of every device share. Contracts: widedeep/ops/optim.py.
#pragma once
#include "bindings/checks.h"

namespace widedeep {

// float32, contiguous, of the weight's shape and on its device.
inline void check_same(const Tensor& t, const Tensor& weight, const char* op, const std::string& name) {
  bool fits = t.dim() == weight.dim() && t.scalar_type() == ScalarType::Float && t.is_contiguous();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == weight.size(i);
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a contiguous float32 tensor of the weight's shape, got ", describe(t),
                  " for ", describe(weight));
  check_device(t, op, name, weight);
}

inline void check_loss_scale(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                             const char* op, const Tensor& like) {
  check_scalar(grad_scale, op, "grad_scale", ScalarType::Float, like);
  check_scalar(found_inf, op, "found_inf", ScalarType::Float, like);
}

// The lists of rmsprop_dense_, but for the sizes of gradients and copies.
inline void check_rmsprop_lists(const std::vector<Tensor>& weights, const std::vector<Tensor>& rms,
                                const std::vector<Tensor>& grads, const std::vector<Tensor>& copies, const Tensor& lr,
                                const char* op) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(rms.size() == count && grads.size() == count && (copies.empty() || copies.size() == count), op,
                  ": weights, rms, grads and copies (if any) must be lists of one length, got ", count, ", ",
                  rms.size(), ", ", grads.size(), ", ", copies.size());
  check_scalar(lr, op, "lr", ScalarType::Float, count > 0 ? weights[0] : lr);
  for (size_t i = 0; i < count; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    check_same(weights[i], weights[i], op, "weights" + at);
    check_device(weights[i], op, "weights" + at, weights[0]);
    check_same(rms[i], weights[i], op, "rms" + at);
  }
}

// rows [n] and grads, one row of the weight for each entry; n.
inline int64_t check_listed_rows(const Tensor& weight, const Tensor& rows, const Tensor& grads, const char* op) {
  check(rows, op, "rows", ScalarType::Long, {kAny}, weight);
  STD_TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2, op, ": weight must be [R] or [R, D], got ", describe(weight));
  const int64_t n = rows.size(0), D = weight.dim() == 2 ? weight.size(1) : 1;
  STD_TORCH_CHECK(grads.scalar_type() == ScalarType::Float && grads.is_contiguous() && grads.dim() == weight.dim() &&
                      grads.size(0) == n && grads.numel() == n * D,
                  op, ": grads must be contiguous float32, one row of the weight per entry of rows, got ",
                  describe(grads), " for ", n, " rows of ", D);
  check_device(grads, op, "grads", weight);
  return n;
}

inline void check_rmsprop_rows(const Tensor& weight, const Tensor& rms, const Tensor& last_step, const Tensor& lr,
                               const Tensor& step, const char* op) {
  check(weight, op, "weight", ScalarType::Float, {kAny, kAny}, weight);
  check(rms, op, "rms", ScalarType::Float, {weight.size(0), weight.size(1)}, weight);
  check(last_step, op, "last_step", ScalarType::Int, {weight.size(0)}, weight);
  check_scalar(lr, op, "lr", ScalarType::Float, weight);
  check_scalar(step, op, "step", ScalarType::Long, weight);
}

inline void check_settle(const Tensor& rms, const Tensor& last_step, const Tensor& step) {
  const char* op = "rmsprop_settle_";
  check(rms, op, "rms", ScalarType::Float, {kAny, kAny}, rms);
  check(last_step, op, "last_step", ScalarType::Int, {rms.size(0)}, rms);
  check_scalar(step, op, "step", ScalarType::Long, rms);
}

inline void check_ftrl(const Tensor& weight, const Tensor& accum, const Tensor& linear, const char* op) {
  check_same(weight, weight, op, "weight");
  check_same(accum, weight, op, "accum");
  check_same(linear, weight, op, "linear");
}

}  // namespace widedeep
