// Optimizer ops on the CPU. Contracts: widedeep/ops/optim.py.
#include <torch/csrc/stable/library.h>

#include "bindings/optim_checks.h"
#include "bindings/pointers.h"
#include "cpu/optim.h"

namespace widedeep {
namespace {

bool skipped(const std::optional<Tensor>& found_inf) { return found_inf.has_value() && *values(*found_inf) != 0.0f; }
float inverse(const std::optional<Tensor>& scale) { return scale.has_value() ? 1.0f / *values(*scale) : 1.0f; }

void check_rows(const Tensor& rows, int64_t R, const char* op) {
  const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i)
    STD_TORCH_CHECK(row[i] >= -1 && row[i] < R, op, ": rows[", i, "] is ", row[i], ", outside [-1, ", R, ")");
}

void rmsprop_dense_(std::vector<Tensor> weights, std::vector<Tensor> rms, std::vector<Tensor> grads,
                    std::vector<Tensor> copies, Tensor lr, double rho, double eps, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> found_inf) {
  const char* op = "rmsprop_dense_";
  check_rmsprop_lists(weights, rms, grads, copies, lr, op);
  check_loss_scale(grad_scale, found_inf, op, lr);
  std::vector<cpu::DenseParameter> parameters;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const int64_t n = weights[i].numel();
    const auto grad_type = element_type(grads[i].scalar_type(), op, "grads");
    STD_TORCH_CHECK(grads[i].numel() == n && grads[i].is_contiguous(), op, ": grads", at,
                    " must be contiguous with the weight's ", n, " elements, got ", describe(grads[i]));
    cpu::DenseParameter p{floats(weights[i]), floats(rms[i]),  grads[i].const_data_ptr(), nullptr, n,
                          grad_type,          core::DType::f32};
    if (!copies.empty()) {
      STD_TORCH_CHECK(copies[i].numel() == n && copies[i].is_contiguous(), op, ": copies", at,
                      " must be contiguous with the weight's ", n, " elements, got ", describe(copies[i]));
      p.copy_type = element_type(copies[i].scalar_type(), op, "copies");
      p.copy = copies[i].mutable_data_ptr();
    }
    parameters.push_back(p);
  }
  if (skipped(found_inf)) return;
  const core::RmspropRule rule{*values(lr), static_cast<float>(rho), static_cast<float>(eps)};
  for (const auto& p : parameters) cpu::rmsprop_dense(p, rule, inverse(grad_scale));
}

void rmsprop_rows_(Tensor weight, Tensor rms, Tensor last_step, Tensor rows, Tensor grads, Tensor lr, Tensor step,
                   double rho, double eps) {
  const char* op = "rmsprop_rows_";
  check_rmsprop_rows(weight, rms, last_step, lr, step, op);
  const int64_t n = check_listed_rows(weight, rows, grads, op), R = weight.size(0), D = weight.size(1);
  check_rows(rows, R, op);
  cpu::rmsprop_rows(floats(weight), floats(rms), ints(last_step), static_cast<const int64_t*>(rows.const_data_ptr()),
                    values(grads), n, D, {*values(lr), static_cast<float>(rho), static_cast<float>(eps)},
                    *step_of(step));
}

void rmsprop_settle_(Tensor rms, Tensor last_step, Tensor step, double rho) {
  check_settle(rms, last_step, step);
  cpu::rmsprop_settle(floats(rms), ints(last_step), rms.size(0), rms.size(1), *step_of(step), static_cast<float>(rho));
}

void ftrl_dense_(Tensor weight, Tensor accum, Tensor linear, Tensor grad, double lr, double l1, double l2,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "ftrl_dense_";
  check_ftrl(weight, accum, linear, op);
  const core::FtrlRule rule = ftrl_rule(lr, l1, l2, op);
  check_same(grad, weight, op, "grad");
  check_loss_scale(grad_scale, found_inf, op, weight);
  if (skipped(found_inf)) return;
  cpu::ftrl_dense(floats(weight), floats(accum), floats(linear), values(grad), weight.numel(), rule,
                  inverse(grad_scale));
}

void ftrl_rows_(Tensor weight, Tensor accum, Tensor linear, Tensor rows, Tensor grads, double lr, double l1,
                double l2) {
  const char* op = "ftrl_rows_";
  check_ftrl(weight, accum, linear, op);
  const core::FtrlRule rule = ftrl_rule(lr, l1, l2, op);
  const int64_t n = check_listed_rows(weight, rows, grads, op), D = weight.dim() == 2 ? weight.size(1) : 1;
  check_rows(rows, weight.size(0), op);
  cpu::ftrl_rows(floats(weight), floats(accum), floats(linear), static_cast<const int64_t*>(rows.const_data_ptr()),
                 values(grads), n, D, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("rmsprop_dense_", TORCH_BOX(&rmsprop_dense_));
  m.impl("rmsprop_rows_", TORCH_BOX(&rmsprop_rows_));
  m.impl("rmsprop_settle_", TORCH_BOX(&rmsprop_settle_));
  m.impl("ftrl_dense_", TORCH_BOX(&ftrl_dense_));
  m.impl("ftrl_rows_", TORCH_BOX(&ftrl_rows_));
}

}  // namespace widedeep
