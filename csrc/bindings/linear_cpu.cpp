// Hidden layers on the CPU: our own products with everything fused into them; where the CPU multiplies bfloat16,
// torch's in that type (oneDNN: AVX512-BF16, AMX), followed by one fused pass. Contracts: widedeep/ops/linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <tuple>

#include "bindings/linear_checks.h"
#include "bindings/pointers.h"
#include "cpu/bf16.h"
#include "cpu/linear.h"
#include "cpu/transpose_copy.h"

namespace widedeep {
namespace {

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

cpu::LinearSize size_of(const Layer& l) { return {l.B, l.I, l.O}; }

void linear_relu_dropout_out(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                             int64_t first_row, Tensor y, std::optional<Tensor> bits) {
  const Layer l = check_linear(x, weight, bias, p, step, layer, y, bits);
  auto* positive = bits.has_value() ? static_cast<uint8_t*>(bits->mutable_data_ptr()) : nullptr;
  const auto dropout =
      core::make_dropout(p, static_cast<uint64_t>(seed), *static_cast<const uint64_t*>(step.const_data_ptr()),
                         static_cast<uint32_t>(layer));
  const Tensor offset = converted(bias, ScalarType::Float);
  if (through_library(l.dtype)) {
    library_product(x, transposed(weight), y);
    cpu::bias_relu_dropout(l.dtype, y.mutable_data_ptr(), values(offset), l.B, l.O, dropout, first_row, positive);
  } else {
    cpu::linear_forward(l.dtype, size_of(l), x.const_data_ptr(), weight.const_data_ptr(), values(offset), dropout,
                        first_row, y.mutable_data_ptr(), positive);
  }
}

Tensor linear_relu_dropout(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                           int64_t first_row) {
  Tensor y = new_outputs(x, weight);
  linear_relu_dropout_out(x, weight, bias, p, seed, step, layer, first_row, y, std::nullopt);
  return y;
}

void linear_dgrad_out(Tensor dz, Tensor weight, std::optional<Tensor> mask, double p, Tensor dx,
                      std::optional<Tensor> dbias, std::optional<Tensor> bits) {
  const Layer l = check_dgrad(dz, weight, mask, p, dx, dbias, bits);
  const cpu::Mask keep{mask.has_value() ? mask->const_data_ptr() : nullptr,
                       bits.has_value() ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr};
  float* sums = floats(dbias);
  const float scale = core::dropout_scale(p);
  if (!through_library(l.dtype)) {
    cpu::linear_dgrad(l.dtype, size_of(l), dz.const_data_ptr(), weight.const_data_ptr(), keep, scale,
                      dx.mutable_data_ptr(), sums);
    return;
  }
  library_product(dz, weight, dx);
  if (keep.values != nullptr || keep.bits != nullptr || sums != nullptr)
    cpu::mask_and_sum(l.dtype, dx.const_data_ptr(), keep, scale, dx.mutable_data_ptr(), sums, l.B, l.I);
}

void linear_wgrad_out(Tensor dz, Tensor x, Tensor dweight) {
  const Layer l = check_wgrad(dz, x, dweight);
  if (!through_library(l.dtype)) {
    cpu::linear_wgrad(l.dtype, size_of(l), dz.const_data_ptr(), x.const_data_ptr(), floats(dweight));
  } else {
    // A product whose first operand is a transposed view takes the library (oneDNN, on AMX) twice as long.
    const Tensor turned = torch::stable::new_empty(dz, {l.O, l.B}), rounded = torch::stable::new_empty(dz, {l.O, l.I});
    cpu::transpose(static_cast<const uint16_t*>(dz.const_data_ptr()), static_cast<uint16_t*>(turned.mutable_data_ptr()),
                   l.B, l.O);
    library_product(turned, x, rounded);
    torch::stable::copy_(dweight, rounded);
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_dropout_backward(Tensor dy, Tensor y, Tensor x, Tensor weight,
                                                                double p) {
  const Layer l = check_backward(dy, y, weight, p);
  Tensor dz = torch::stable::new_empty(dy, {l.B, l.O}), dx = torch::stable::new_empty(dy, {l.B, l.I});
  Tensor dweight = torch::stable::new_empty(dy, {l.O, l.I}, ScalarType::Float);
  Tensor dbias = torch::stable::new_empty(dy, {l.O}, ScalarType::Float);
  cpu::mask_and_sum(l.dtype, dy.const_data_ptr(), {y.const_data_ptr(), nullptr}, core::dropout_scale(p),
                    dz.mutable_data_ptr(), floats(dbias), l.B, l.O);
  linear_wgrad_out(dz, x, dweight);
  linear_dgrad_out(dz, weight, std::nullopt, 0.0, dx, std::nullopt, std::nullopt);
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
