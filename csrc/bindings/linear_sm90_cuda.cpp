// Hidden layers on Hopper, fused. Contracts: widedeep/ops/linear_sm90.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/checks.h"
#include "bindings/stream.h"
#include "core/philox.h"
#include "kernels/gemm_sm90.h"
#include "kernels/linear_elementwise.h"

namespace widedeep {
namespace {

// C [M, N] = A [M, K] B [N, K]^T.
kernels::GemmSm90 shape_of(const Tensor& a, const Tensor& b, const char* op) {
  const core::DType dtype = element_type(a.scalar_type(), op, "the first argument");
  check(a, op, "the first argument", a.scalar_type(), {kAny, kAny}, a);
  check(b, op, "the weight", a.scalar_type(), {kAny, a.size(1)}, a);
  STD_TORCH_CHECK(b.size(0) % 8 == 0 && b.size(1) % 8 == 0, op,
                  ": the layer's sizes must be multiples of 8, got weight ", describe(b));
  return {a.size(0), b.size(0), a.size(1), dtype};
}

void* mask_pointer(const std::optional<Tensor>& mask, const kernels::GemmSm90& shape, const char* op,
                   const Tensor& like) {
  if (!mask.has_value()) return nullptr;
  check(*mask, op, "mask", ScalarType::Byte, {kernels::sm90_mask_bytes(shape.M, shape.N)}, like);
  return mask->mutable_data_ptr();
}

void linear_sm90_out(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                     int64_t first_row, Tensor y, std::optional<Tensor> mask) {
  const char* op = "linear_sm90";
  const auto shape = shape_of(x, weight, op);
  check(bias, op, "bias", x.scalar_type(), {shape.N}, x);
  check(y, op, "y", x.scalar_type(), {shape.M, shape.N}, x);
  check_scalar(step, op, "step", ScalarType::Long, x);
  check_dropout(p, op);
  STD_TORCH_CHECK(layer >= 0 && layer < 256, op, ": layer must be in [0, 256), got ", layer);
  const DeviceGuard guard(x.get_device_index());
  const kernels::DropoutArgs dropout{core::dropout_threshold(p),   core::dropout_scale(p),
                                     static_cast<uint64_t>(seed),  static_cast<const int64_t*>(step.const_data_ptr()),
                                     static_cast<uint32_t>(layer), static_cast<uint32_t>(first_row)};
  STD_CUDA_CHECK(kernels::linear_forward_sm90(x.const_data_ptr(), weight.const_data_ptr(), bias.const_data_ptr(),
                                              y.mutable_data_ptr(), mask_pointer(mask, shape, op, x), shape, dropout,
                                              current_stream(x)));
}

void linear_sm90_dgrad_out(Tensor dz, Tensor weight_t, std::optional<Tensor> mask, double p, Tensor dx,
                           std::optional<Tensor> dbias, std::optional<Tensor> found_inf) {
  const char* op = "linear_sm90_dgrad";
  const auto shape = shape_of(dz, weight_t, op);
  check(dx, op, "dx", dz.scalar_type(), {shape.M, shape.N}, dz);
  if (dbias.has_value()) check(*dbias, op, "dbias", ScalarType::Float, {shape.N}, dz);
  check_scalar(found_inf, op, "found_inf", ScalarType::Float, dz);
  STD_TORCH_CHECK(!(mask.has_value() && found_inf.has_value()), op, ": found_inf goes without a mask");
  STD_TORCH_CHECK(!found_inf.has_value() || shape.dtype != core::DType::f32, op, ": found_inf goes with half types");
  check_dropout(p, op);
  const DeviceGuard guard(dz.get_device_index());
  const int64_t rows = dbias.has_value() ? kernels::sm90_strips(shape.M) : 0;
  const Tensor sums = torch::stable::new_empty(dz, {rows, shape.N}, ScalarType::Float);
  auto* partial = rows > 0 ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  const cudaStream_t stream = current_stream(dz);
  auto* found = found_inf.has_value() ? static_cast<float*>(found_inf->mutable_data_ptr()) : nullptr;
  STD_CUDA_CHECK(kernels::linear_dgrad_sm90(
      dz.const_data_ptr(), weight_t.const_data_ptr(), mask_pointer(mask, shape, op, dz),
      mask.has_value() ? core::dropout_scale(p) : 1.f, dx.mutable_data_ptr(), partial, found, shape, stream));
  if (dbias.has_value())
    STD_CUDA_CHECK(kernels::add_strips(partial, static_cast<float*>(dbias->mutable_data_ptr()), rows, shape.N, stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("linear_sm90_out", TORCH_BOX(&linear_sm90_out));
  m.impl("linear_sm90_dgrad_out", TORCH_BOX(&linear_sm90_dgrad_out));
}

}  // namespace widedeep
