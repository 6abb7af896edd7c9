// Output layer and loss on the CPU. Contracts: widedeep/ops/head.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/head_checks.h"
#include "bindings/pointers.h"
#include "core/philox.h"
#include "cpu/head.h"

namespace widedeep {
namespace {

cpu::HeadInputs inputs(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& wide_logit,
                       const char* op) {
  check_head(h, weight, bias, wide_logit, op);
  return {
      h.const_data_ptr(), element_type(h.scalar_type(), op, "h"), h.size(0), h.size(1), values(weight), *values(bias),
      values(wide_logit)};
}

Tensor head_forward(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_forward");
  Tensor logit = torch::stable::new_empty(wide_logit, {in.B});
  cpu::head_forward(in, floats(logit));
  return logit;
}

void head_forward_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, Tensor logit) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_forward_out");
  check(logit, "head_forward_out", "logit", ScalarType::Float, {in.B}, h);
  cpu::head_forward(in, floats(logit));
}

void head_step_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, Tensor label, int64_t global_rows, double p,
                   std::optional<Tensor> loss_scale, Tensor logit, Tensor dlogit, Tensor dz, Tensor dbias_hidden,
                   Tensor dweight, Tensor dbias, Tensor loss) {
  const auto in = inputs(h, weight, bias, wide_logit, "head_step_out");
  check_head_step(h, label, global_rows, p, loss_scale, {logit, dlogit, dz, dbias_hidden, dweight, dbias, loss});
  cpu::head_step(in, {values(label), global_rows, loss_scale.has_value() ? *values(*loss_scale) : 1.0f,
                      core::dropout_scale(p), floats(logit), floats(dlogit), dz.mutable_data_ptr(),
                      floats(dbias_hidden), floats(dweight), floats(dbias), floats(loss)});
}

void wide_numeric_backward_out(Tensor numeric, Tensor dlogit, Tensor dweight, Tensor dbias) {
  check_wide_numeric_backward(numeric, dlogit, dweight, dbias);
  cpu::wide_numeric_backward(values(numeric), values(dlogit), numeric.size(0), numeric.size(1), floats(dweight),
                             floats(dbias));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_forward_out", TORCH_BOX(&head_forward_out));
  m.impl("head_step_out", TORCH_BOX(&head_step_out));
  m.impl("wide_numeric_backward_out", TORCH_BOX(&wide_numeric_backward_out));
}

}  // namespace widedeep
