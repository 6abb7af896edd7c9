// Checks that the head bindings of every device share. Contracts: widedeep/ops/head.py.
#pragma once
#include <array>

#include "bindings/checks.h"

namespace widedeep {

inline void check_head(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& wide_logit,
                       const char* op) {
  element_type(h.scalar_type(), op, "h");
  check(h, op, "h", h.scalar_type(), {kAny, kAny}, h);
  check(weight, op, "weight", ScalarType::Float, {1, h.size(1)}, h);
  check(bias, op, "bias", ScalarType::Float, {1}, h);
  check(wide_logit, op, "wide_logit", ScalarType::Float, {h.size(0)}, h);
}

// outputs: logit, dlogit, dz, dbias_hidden, dweight, dbias, loss.
inline void check_head_step(const Tensor& h, const Tensor& label, int64_t global_rows, double p,
                            const std::optional<Tensor>& loss_scale, const std::array<Tensor, 7>& outputs) {
  const char* op = "head_step_out";
  const int64_t B = h.size(0), H = h.size(1);
  STD_TORCH_CHECK(global_rows >= 1, op, ": global_rows must be >= 1, got ", global_rows);
  check_dropout(p, op);
  check(label, op, "label", ScalarType::Float, {B}, h);
  check_scalar(loss_scale, op, "loss_scale", ScalarType::Float, h);
  check(outputs[0], op, "logit", ScalarType::Float, {B}, h);
  check(outputs[1], op, "dlogit", ScalarType::Float, {B}, h);
  check(outputs[2], op, "dz", h.scalar_type(), {B, H}, h);
  check(outputs[3], op, "dbias_hidden", ScalarType::Float, {H}, h);
  check(outputs[4], op, "dweight", ScalarType::Float, {1, H}, h);
  check(outputs[5], op, "dbias", ScalarType::Float, {1}, h);
  check_scalar(outputs[6], op, "loss", ScalarType::Float, h);
}

inline void check_wide_numeric_backward(const Tensor& numeric, const Tensor& dlogit, const Tensor& dweight,
                                        const Tensor& dbias) {
  const char* op = "wide_numeric_backward_out";
  check(numeric, op, "numeric", ScalarType::Float, {kAny, kAny}, numeric);
  check(dlogit, op, "dlogit", ScalarType::Float, {numeric.size(0)}, numeric);
  check(dweight, op, "dweight", ScalarType::Float, {numeric.size(1)}, numeric);
  check(dbias, op, "dbias", ScalarType::Float, {1}, numeric);
}

}  // namespace widedeep
