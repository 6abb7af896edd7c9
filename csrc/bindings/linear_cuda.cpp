// Hidden layers on any GPU: cuBLASLt products with our passes around them. Contracts: widedeep/ops/linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <tuple>

#include "bindings/linear_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "core/philox.h"
#include "kernels/gemm.h"
#include "kernels/linear_elementwise.h"

namespace widedeep {
namespace {

std::atomic<bool> tf32_allowed{false};

Tensor bytes(const Tensor& like, int64_t count) { return torch::stable::new_empty(like, {count}, ScalarType::Byte); }

void product(kernels::Product kind, const Layer& l, const Tensor& a, const Tensor& b, const void* bias, const Tensor& d,
             const char* op) {
#if WIDEDEEP_CUBLASLT
  const Tensor workspace = bytes(a, kernels::kGemmWorkspace);
  const kernels::Gemm problem{
      kind,           l.B, l.I, l.O, l.dtype, element_type(d.scalar_type(), op, "the result"), tf32_allowed.load(),
      bias != nullptr};
  STD_CUDA_CHECK(kernels::gemm(problem, a.const_data_ptr(), b.const_data_ptr(), bias, d.mutable_data_ptr(),
                               workspace.mutable_data_ptr(), current_stream(a)));
#else
  STD_TORCH_CHECK(false, op, ": this build has no cuBLASLt; `widedeep doctor` says how to get it");
#endif
}

Tensor in_dtype_of(const Tensor& x, const Tensor& bias) {
  return bias.scalar_type() == x.scalar_type() ? bias : torch::stable::to(bias, x.scalar_type());
}

void linear_relu_dropout_out(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                             int64_t first_row, Tensor y, std::optional<Tensor> bits) {
  const char* op = "linear_relu_dropout";
  const Layer l = check_linear(x, weight, bias, p, step, layer, y, bits);
  check_aligned(y, op, "y");
  const DeviceGuard guard(x.get_device_index());
  const Tensor offset = in_dtype_of(x, bias);
  // The library's own epilogue is nearly free, where it has one; with dropout one pass does all three, and the bits.
  if (core::dropout_threshold(p) == 0 && !bits.has_value() && l.O % 8 == 0 && l.I % 8 == 0) {
    product(kernels::Product::forward, l, x, weight, offset.const_data_ptr(), y, op);
    return;
  }
  check_aligned(offset, op, "bias");
  if (bits.has_value()) check_aligned(*bits, op, "bits");
  auto* positive = bits.has_value() ? static_cast<uint32_t*>(bits->mutable_data_ptr()) : nullptr;
  product(kernels::Product::forward, l, x, weight, nullptr, y, op);
  const auto dropout = kernels::dropout_args(p, seed, step_of(step), layer, first_row);
  STD_CUDA_CHECK(kernels::bias_relu_dropout(y.mutable_data_ptr(), offset.const_data_ptr(), positive, l.B, l.O, l.dtype,
                                            dropout, current_stream(x)));
}

Tensor linear_relu_dropout(Tensor x, Tensor weight, Tensor bias, double p, int64_t seed, Tensor step, int64_t layer,
                           int64_t first_row) {
  Tensor y = new_outputs(x, weight);
  linear_relu_dropout_out(x, weight, bias, p, seed, step, layer, first_row, y, std::nullopt);
  return y;
}

// out = in masked (by a matrix, or by bits) and scaled; dbias [N] its column sums, in two fixed-order stages.
void masked(const Tensor& in, const Tensor* mask, const Tensor* bits, float scale, const Tensor& out,
            const Tensor* dbias, core::DType dtype) {
  const int64_t M = in.size(0), N = in.size(1), strips = kernels::mask_strips(M);
  for (const Tensor* t : {&in, mask})
    if (t) check_aligned(*t, "linear_dgrad", t == mask ? "the mask" : "the gradient");
  const cudaStream_t stream = current_stream(in);
  float* sums = nullptr;
  Tensor partial = bytes(in, dbias ? strips * N * int64_t{sizeof(float)} : 0);
  if (dbias) sums = floats(partial);
  const kernels::Mask keep{mask ? mask->const_data_ptr() : nullptr,
                           bits ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr};
  STD_CUDA_CHECK(
      kernels::mask_and_sum(in.const_data_ptr(), keep, scale, out.mutable_data_ptr(), sums, M, N, dtype, stream));
  if (!dbias) return;
  const kernels::StripSums total{sums, floats(*dbias), N};
  STD_CUDA_CHECK(kernels::add_strips(&total, 1, strips, stream));
}

void linear_dgrad_out(Tensor dz, Tensor weight, std::optional<Tensor> mask, double p, Tensor dx,
                      std::optional<Tensor> dbias, std::optional<Tensor> bits) {
  const char* op = "linear_dgrad";
  const Layer l = check_dgrad(dz, weight, mask, p, dx, dbias, bits);
  const DeviceGuard guard(dz.get_device_index());
  product(kernels::Product::dgrad, l, dz, weight, nullptr, dx, op);
  const bool any = mask.has_value() || bits.has_value();
  const auto pointer = [](const std::optional<Tensor>& t) { return t.has_value() ? &*t : nullptr; };
  if (any || dbias.has_value())
    masked(dx, pointer(mask), pointer(bits), any ? core::dropout_scale(p) : 1.f, dx, pointer(dbias), l.dtype);
}

void linear_wgrad_out(Tensor dz, Tensor x, Tensor dweight) {
  const char* op = "linear_wgrad";
  const Layer l = check_wgrad(dz, x, dweight);
  const DeviceGuard guard(dz.get_device_index());
  product(kernels::Product::wgrad, l, dz, x, nullptr, dweight, op);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_dropout_backward(Tensor dy, Tensor y, Tensor x, Tensor weight,
                                                                double p) {
  const char* op = "linear_relu_dropout_backward";
  const Layer l = check_backward(dy, y, weight, p);
  const DeviceGuard guard(dy.get_device_index());
  const Tensor dz = torch::stable::new_empty(dy, {l.B, l.O}), dx = torch::stable::new_empty(dy, {l.B, l.I});
  const Tensor dweight = torch::stable::new_empty(dy, {l.O, l.I}, ScalarType::Float);
  const Tensor dbias = torch::stable::new_empty(dy, {l.O}, ScalarType::Float);
  masked(dy, &y, nullptr, core::dropout_scale(p), dz, &dbias, l.dtype);
  linear_wgrad_out(dz, x, dweight);
  product(kernels::Product::dgrad, l, dz, weight, nullptr, dx, op);
  return {dx, dweight, dbias};
}

void allow_tf32_(Tensor like, bool allow) { tf32_allowed.store(allow); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("linear_relu_dropout", TORCH_BOX(&linear_relu_dropout));
  m.impl("linear_relu_dropout_backward", TORCH_BOX(&linear_relu_dropout_backward));
  m.impl("linear_relu_dropout_out", TORCH_BOX(&linear_relu_dropout_out));
  m.impl("linear_dgrad_out", TORCH_BOX(&linear_dgrad_out));
  m.impl("linear_wgrad_out", TORCH_BOX(&linear_wgrad_out));
  m.impl("allow_tf32_", TORCH_BOX(&allow_tf32_));
}

}  // namespace widedeep
