// Output layer and loss on a GPU. Contracts: widedeep/ops/head.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/head_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "core/philox.h"
#include "kernels/head.h"

namespace widedeep {
namespace {

kernels::HeadInputs inputs(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& wide_logit,
                           const char* op) {
  check_head(h, weight, bias, wide_logit, op);
  STD_TORCH_CHECK(h.size(1) <= kernels::kMaxRagged || (h.size(1) <= kernels::kMaxHead && h.size(1) % 8 == 0), op,
                  ": on a GPU the last hidden layer has at most ", kernels::kMaxHead, " units, a multiple of 8 from ",
                  kernels::kMaxRagged, " on, got ", h.size(1));
  if (h.size(1) % 8 == 0) check_aligned(h, op, "h");
  return {
      h.const_data_ptr(), element_type(h.scalar_type(), op, "h"), h.size(0), h.size(1), values(weight), values(bias),
      values(wide_logit)};
}

Tensor head_forward(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_forward");
  const DeviceGuard guard(h.get_device_index());
  Tensor logit = torch::stable::new_empty(wide_logit, {in.B});
  STD_CUDA_CHECK(kernels::head_forward(in, floats(logit), current_stream(h)));
  return logit;
}

void head_forward_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, Tensor logit) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_forward_out");
  check(logit, "head_forward_out", "logit", ScalarType::Float, {in.B}, h);
  const DeviceGuard guard(h.get_device_index());
  STD_CUDA_CHECK(kernels::head_forward(in, floats(logit), current_stream(h)));
}

void head_step_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, Tensor label, int64_t global_rows, double p,
                   std::optional<Tensor> loss_scale, Tensor logit, Tensor dlogit, Tensor dz, Tensor dbias_hidden,
                   Tensor dweight, Tensor dbias, Tensor loss) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_step_out");
  check_head_step(h, label, global_rows, p, loss_scale, {logit, dlogit, dz, dbias_hidden, dweight, dbias, loss});
  if (in.H % 8 == 0) check_aligned(dz, "head_step_out", "dz");
  const DeviceGuard guard(h.get_device_index());
  const Tensor memory =
      torch::stable::new_empty(h, {static_cast<int64_t>(kernels::head_workspace(in.H))}, ScalarType::Byte);
  const kernels::HeadStep out{
      values(label),          global_rows,          loss_scale.has_value() ? values(*loss_scale) : nullptr,
      core::dropout_scale(p), floats(logit),        floats(dlogit),
      dz.mutable_data_ptr(),  floats(dbias_hidden), floats(dweight),
      floats(dbias),          floats(loss)};
  STD_CUDA_CHECK(kernels::head_step(in, out, memory.mutable_data_ptr(), current_stream(h)));
}

void wide_numeric_backward_out(Tensor numeric, Tensor dlogit, Tensor dweight, Tensor dbias) {
  check_wide_numeric_backward(numeric, dlogit, dweight, dbias);
  const int64_t B = numeric.size(0), N = numeric.size(1);
  STD_TORCH_CHECK(N <= kernels::kMaxWideNumeric, "wide_numeric_backward_out: on a GPU there are at most ",
                  kernels::kMaxWideNumeric, " numeric features, got ", N);
  const DeviceGuard guard(numeric.get_device_index());
  const Tensor memory =
      torch::stable::new_empty(numeric, {static_cast<int64_t>(kernels::wide_numeric_workspace(N))}, ScalarType::Byte);
  STD_CUDA_CHECK(kernels::wide_numeric_backward(values(numeric), values(dlogit), B, N, floats(dweight), floats(dbias),
                                                memory.mutable_data_ptr(), current_stream(numeric)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_forward_out", TORCH_BOX(&head_forward_out));
  m.impl("head_step_out", TORCH_BOX(&head_step_out));
  m.impl("wide_numeric_backward_out", TORCH_BOX(&wide_numeric_backward_out));
}

}  // namespace widedeep
