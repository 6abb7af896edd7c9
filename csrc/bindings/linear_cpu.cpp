// Hidden layers on the CPU: our own products with everything fused into them; where the CPU multiplies bfloat16,
// torch's in that type (oneDNN: AVX512-BF16, AMX), followed by one fused pass. Contracts: widedeep/ops/linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>

#include "bindings/checks.h"
#include "cpu/bf16.h"
#include "cpu/linear.h"

namespace widedeep {
namespace {

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* out_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// out = a b, in torch.
void library_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference, and drops it
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

bool through_library(core::DType type) { return type == core::DType::bf16 && cpu::library_bf16(); }

// Sizes of a layer whose x and weight fit each other and share their storage type.
cpu::LinearSize layer_size(const Tensor& x, const Tensor& weight, const char* op) {
  check(weight, op, "weight", x.scalar_type(), {kAny, kAny}, x);
  return {x.size(0), weight.size(1), weight.size(0)};
}

void linear_relu_dropout_out(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                             int64_t first_row, Tensor y) {
  const char* op = "linear_relu_dropout";
  const auto type = element_type(x.scalar_type(), op, "x");
  const auto size = layer_size(x, weight, op);
  check(x, op, "x", x.scalar_type(), {kAny, size.I}, x);
  check(bias, op, "bias", bias.scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type(), {size.O}, x);
  check(y, op, "y", x.scalar_type(), {size.B, size.O}, x);
  check_scalar(step, op, "step", ScalarType::Long, x);
  check_dropout(p, op);
  STD_TORCH_CHECK(layer >= 0 && layer < 256, op, ": layer must be in [0, 256), got ", layer);
  const auto dropout =
      core::make_dropout(p, static_cast<uint64_t>(seed), *static_cast<const uint64_t*>(step.const_data_ptr()),
                         static_cast<uint32_t>(layer));
  const Tensor offset = converted(bias, ScalarType::Float);
  if (through_library(type)) {
    library_product(x, transposed(weight), y);
    cpu::bias_relu_dropout(type, y.mutable_data_ptr(), floats(offset), size.B, size.O, dropout, first_row);
  } else {
    cpu::linear_forward(type, size, x.const_data_ptr(), weight.const_data_ptr(), floats(offset), dropout, first_row,
                        y.mutable_data_ptr());
  }
}

Tensor linear_relu_dropout(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                           int64_t first_row) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "linear_relu_dropout: x and weight must be matrices, got ",
                  describe(x), " and ", describe(weight));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  linear_relu_dropout_out(x, weight, bias, p, seed, step, layer, first_row, y);
  return y;
}

void linear_dgrad_out(Tensor dz, Tensor weight, std::optional<Tensor> mask, double p, Tensor dx,
                      std::optional<Tensor> dbias) {
  const char* op = "linear_dgrad";
  const auto type = element_type(dz.scalar_type(), op, "dz");
  const auto size = layer_size(dz, weight, op);
  check(dz, op, "dz", dz.scalar_type(), {kAny, size.O}, dz);
  check(dx, op, "dx", dz.scalar_type(), {size.B, size.I}, dz);
  if (mask.has_value()) check(*mask, op, "mask", dz.scalar_type(), {size.B, size.I}, dz);
  if (dbias.has_value()) check(*dbias, op, "dbias", ScalarType::Float, {size.I}, dz);
  check_dropout(p, op);
  const void* keep = mask.has_value() ? mask->const_data_ptr() : nullptr;
  float* sums = dbias.has_value() ? out_floats(*dbias) : nullptr;
  const float scale = core::dropout_scale(p);
  if (!through_library(type)) {
    cpu::linear_dgrad(type, size, dz.const_data_ptr(), weight.const_data_ptr(), keep, scale, dx.mutable_data_ptr(),
                      sums);
    return;
  }
  library_product(dz, weight, dx);
  if (keep != nullptr || sums != nullptr)
    cpu::mask_and_sum(type, dx.const_data_ptr(), keep, scale, dx.mutable_data_ptr(), sums, size.B, size.I);
}

void linear_wgrad_out(Tensor dz, Tensor x, Tensor dweight) {
  const char* op = "linear_wgrad";
  const auto type = element_type(dz.scalar_type(), op, "dz");
  check(dz, op, "dz", dz.scalar_type(), {kAny, kAny}, dz);
  check(x, op, "x", dz.scalar_type(), {dz.size(0), kAny}, dz);
  check(dweight, op, "dweight", ScalarType::Float, {dz.size(1), x.size(1)}, dz);
  if (!through_library(type)) {
    cpu::linear_wgrad(type, {dz.size(0), x.size(1), dz.size(1)}, dz.const_data_ptr(), x.const_data_ptr(),
                      out_floats(dweight));
  } else {
    const Tensor rounded = torch::stable::new_empty(dz, {dz.size(1), x.size(1)});
    library_product(transposed(dz), x, rounded);
    torch::stable::copy_(dweight, rounded);
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_dropout_backward(Tensor dy, Tensor y, Tensor x, Tensor weight,
                                                                double p) {
  const char* op = "linear_relu_dropout_backward";
  const auto type = element_type(dy.scalar_type(), op, "dy");
  const auto size = layer_size(dy, weight, op);
  check(dy, op, "dy", dy.scalar_type(), {kAny, size.O}, dy);
  check(y, op, "y", dy.scalar_type(), {size.B, size.O}, dy);
  check_dropout(p, op);
  Tensor dz = torch::stable::new_empty(dy, {size.B, size.O}), dx = torch::stable::new_empty(dy, {size.B, size.I});
  Tensor dweight = torch::stable::new_empty(dy, {size.O, size.I}, ScalarType::Float);
  Tensor dbias = torch::stable::new_empty(dy, {size.O}, ScalarType::Float);
  cpu::mask_and_sum(type, dy.const_data_ptr(), y.const_data_ptr(), core::dropout_scale(p), dz.mutable_data_ptr(),
                    out_floats(dbias), size.B, size.O);
  linear_wgrad_out(dz, x, dweight);
  linear_dgrad_out(dz, weight, std::nullopt, 0.0, dx, std::nullopt);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("linear_relu_dropout", TORCH_BOX(&linear_relu_dropout));
  m.impl("linear_relu_dropout_backward", TORCH_BOX(&linear_relu_dropout_backward));
  m.impl("linear_relu_dropout_out", TORCH_BOX(&linear_relu_dropout_out));
  m.impl("linear_dgrad_out", TORCH_BOX(&linear_dgrad_out));
  m.impl("linear_wgrad_out", TORCH_BOX(&linear_wgrad_out));
}

}  // namespace widedeep
