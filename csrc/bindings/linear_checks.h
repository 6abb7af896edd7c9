// Checks that the hidden layers' bindings of every device share. Contracts: widedeep/ops/linear.py.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "bindings/checks.h"
#include "core/bits.h"

namespace widedeep {

struct Layer {
  int64_t B, I, O;
  core::DType dtype;
};

// The layer of a weight [O, I] whose inputs [B, I], or outputs [B, O], are `rows`, all of one type.
inline Layer check_layer(const Tensor& rows, const char* name, bool outputs, const Tensor& weight, const char* op) {
  const core::DType dtype = element_type(rows.scalar_type(), op, name);
  check(weight, op, "weight", rows.scalar_type(), {kAny, kAny}, rows);
  const int64_t O = weight.size(0), I = weight.size(1);
  check(rows, op, name, rows.scalar_type(), {kAny, outputs ? O : I}, rows);
  return {rows.size(0), I, O, dtype};
}

// One bit for each element of a matrix [B, columns]: csrc/core/bits.h.
inline void check_bits(const std::optional<Tensor>& bits, int64_t B, int64_t columns, const char* op,
                       const Tensor& like) {
  if (bits.has_value()) check(*bits, op, "bits", ScalarType::Byte, {B, core::bit_row_bytes(columns)}, like);
}

inline Layer check_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, double p, const Tensor& step,
                          int64_t layer, const Tensor& y, const std::optional<Tensor>& bits) {
  const char* op = "linear_relu_dropout";
  const Layer l = check_layer(x, "x", false, weight, op);
  check(bias, op, "bias", bias.scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type(), {l.O}, x);
  check(y, op, "y", x.scalar_type(), {l.B, l.O}, x);
  check_bits(bits, l.B, l.O, op, x);
  check_scalar(step, op, "step", ScalarType::Long, x);
  check_dropout(p, op);
  STD_TORCH_CHECK(layer >= 0 && layer < 256, op, ": layer must be in [0, 256), got ", layer);
  return l;
}

// y [B, O], for check_linear to look at together with the rest.
inline Tensor new_outputs(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "linear_relu_dropout: x and weight must be matrices, got ",
                  describe(x), " and ", describe(weight));
  return torch::stable::new_empty(x, {x.size(0), weight.size(0)});
}

inline Layer check_dgrad(const Tensor& dz, const Tensor& weight, const std::optional<Tensor>& mask, double p,
                         const Tensor& dx, const std::optional<Tensor>& dbias, const std::optional<Tensor>& bits) {
  const char* op = "linear_dgrad";
  const Layer l = check_layer(dz, "dz", true, weight, op);
  check(dx, op, "dx", dz.scalar_type(), {l.B, l.I}, dz);
  if (mask.has_value()) check(*mask, op, "mask", dz.scalar_type(), {l.B, l.I}, dz);
  check_bits(bits, l.B, l.I, op, dz);
  STD_TORCH_CHECK(!(mask.has_value() && bits.has_value()), op, ": a mask or bits, not both");
  if (dbias.has_value()) check(*dbias, op, "dbias", ScalarType::Float, {l.I}, dz);
  check_dropout(p, op);
  return l;
}

inline Layer check_wgrad(const Tensor& dz, const Tensor& x, const Tensor& dweight) {
  const char* op = "linear_wgrad";
  const core::DType dtype = element_type(dz.scalar_type(), op, "dz");
  check(dz, op, "dz", dz.scalar_type(), {kAny, kAny}, dz);
  check(x, op, "x", dz.scalar_type(), {dz.size(0), kAny}, dz);
  check(dweight, op, "dweight", ScalarType::Float, {dz.size(1), x.size(1)}, dz);
  return {dz.size(0), x.size(1), dz.size(1), dtype};
}

inline Layer check_backward(const Tensor& dy, const Tensor& y, const Tensor& weight, double p) {
  const char* op = "linear_relu_dropout_backward";
  const Layer l = check_layer(dy, "dy", true, weight, op);
  check(y, op, "y", dy.scalar_type(), {l.B, l.O}, dy);
  check_dropout(p, op);
  return l;
}

}  // namespace widedeep
