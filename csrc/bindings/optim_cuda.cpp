// Optimizer ops on a GPU. Contracts: widedeep/ops/optim.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/optim_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "kernels/optim.h"

namespace widedeep {
namespace {

// Row length of a gradient or a half copy of `weight`. As matrices both have the weight's rows, each as long or longer
// (padding); otherwise they have its elements, as one row.
int64_t pitch_of(const Tensor& t, const Tensor& weight, bool matrices, const char* op, const std::string& name) {
  const bool fits = matrices ? t.size(0) == weight.size(0) && t.size(1) >= weight.size(1) : t.numel() == weight.numel();
  STD_TORCH_CHECK(fits && t.is_contiguous(), op, ": ", name,
                  " must be contiguous with the weight's rows, each as long or longer, got ", describe(t), " for ",
                  describe(weight));
  check_device(t, op, name, weight);
  return matrices ? t.size(1) : weight.numel();
}

void rmsprop_dense_(std::vector<Tensor> weights, std::vector<Tensor> rms, std::vector<Tensor> grads,
                    std::vector<Tensor> copies, Tensor lr, double rho, double eps, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> found_inf) {
  const char* op = "rmsprop_dense_";
  check_rmsprop_lists(weights, rms, grads, copies, lr, op);
  check_loss_scale(grad_scale, found_inf, op, lr);
  std::vector<kernels::DenseParameter> parameters;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const Tensor& w = weights[i];
    const bool matrices = w.dim() == 2 && grads[i].dim() == 2 && (copies.empty() || copies[i].dim() == 2);
    kernels::DenseParameter p{};
    p.weight = floats(w);
    p.rms = floats(rms[i]);
    p.grad = grads[i].const_data_ptr();
    p.grad_pitch = pitch_of(grads[i], w, matrices, op, "grads" + at);
    p.grad_type = element_type(grads[i].scalar_type(), op, "grads");
    if (!copies.empty()) {
      p.copy = copies[i].mutable_data_ptr();
      p.copy_pitch = pitch_of(copies[i], w, matrices, op, "copies" + at);
      p.copy_type = element_type(copies[i].scalar_type(), op, "copies");
    }
    p.rows = matrices ? w.size(0) : 1;
    p.columns = matrices ? w.size(1) : w.numel();
    parameters.push_back(p);
  }
  const DeviceGuard guard(lr.get_device_index());
  const kernels::DenseScalars scalars{values(lr), values(grad_scale), values(found_inf), static_cast<float>(rho),
                                      static_cast<float>(eps)};
  STD_CUDA_CHECK(
      kernels::rmsprop_dense(parameters.data(), static_cast<int>(parameters.size()), scalars, current_stream(lr)));
}

void ftrl_dense_(Tensor weight, Tensor accum, Tensor linear, Tensor grad, double lr, double l1, double l2,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "ftrl_dense_";
  check_ftrl(weight, accum, linear, op);
  const core::FtrlRule rule = ftrl_rule(lr, l1, l2, op);
  check_same(grad, weight, op, "grad");
  check_loss_scale(grad_scale, found_inf, op, weight);
  const DeviceGuard guard(weight.get_device_index());
  STD_CUDA_CHECK(kernels::ftrl_dense(floats(weight), floats(accum), floats(linear), values(grad), weight.numel(), rule,
                                     values(grad_scale), values(found_inf), current_stream(weight)));
}

// The sorted order of a sparse gradient, with the memory that it lives in.
struct Sorted {
  Tensor sorted, order, memory;
  kernels::ListedRows rows;
};

Sorted sort(const Tensor& weight, const Tensor& rows, const Tensor& grads, const char* op) {
  const int64_t n = check_listed_rows(weight, rows, grads, op);
  const int64_t R = weight.size(0), D = weight.dim() == 2 ? weight.size(1) : 1;
  STD_TORCH_CHECK(n < INT32_MAX && R < INT32_MAX, op, ": at most 2^31 - 2 rows, got ", n, " listed of ", R);
  const auto bytes = static_cast<int64_t>(kernels::sort_rows_workspace(n, R));
  Sorted s{torch::stable::new_empty(rows, {n}, ScalarType::Int),
           torch::stable::new_empty(rows, {n}, ScalarType::Int),
           torch::stable::new_empty(rows, {n > 0 ? bytes : 0}, ScalarType::Byte),
           {}};
  s.rows = {static_cast<const uint32_t*>(s.sorted.const_data_ptr()),
            static_cast<const int32_t*>(s.order.const_data_ptr()),
            values(grads),
            n,
            D,
            R};
  STD_CUDA_CHECK(kernels::sort_rows(static_cast<const int64_t*>(rows.const_data_ptr()), n, R,
                                    static_cast<uint32_t*>(s.sorted.mutable_data_ptr()), ints(s.order),
                                    s.memory.mutable_data_ptr(), current_stream(rows)));
  return s;
}

void rmsprop_rows_(Tensor weight, Tensor rms, Tensor last_step, Tensor rows, Tensor grads, Tensor lr, Tensor step,
                   double rho, double eps) {
  const char* op = "rmsprop_rows_";
  check_rmsprop_rows(weight, rms, last_step, lr, step, op);
  const DeviceGuard guard(weight.get_device_index());
  const Sorted s = sort(weight, rows, grads, op);
  STD_CUDA_CHECK(kernels::rmsprop_rows(floats(weight), floats(rms), ints(last_step), s.rows, values(lr), step_of(step),
                                       static_cast<float>(rho), static_cast<float>(eps), current_stream(weight)));
}

void rmsprop_settle_(Tensor rms, Tensor last_step, Tensor step, double rho) {
  check_settle(rms, last_step, step);
  const DeviceGuard guard(rms.get_device_index());
  STD_CUDA_CHECK(kernels::rmsprop_settle(floats(rms), ints(last_step), rms.size(0), rms.size(1), step_of(step),
                                         static_cast<float>(rho), current_stream(rms)));
}

void ftrl_rows_(Tensor weight, Tensor accum, Tensor linear, Tensor rows, Tensor grads, double lr, double l1,
                double l2) {
  const char* op = "ftrl_rows_";
  check_ftrl(weight, accum, linear, op);
  const core::FtrlRule rule = ftrl_rule(lr, l1, l2, op);
  const DeviceGuard guard(weight.get_device_index());
  const Sorted s = sort(weight, rows, grads, op);
  STD_CUDA_CHECK(
      kernels::ftrl_rows(floats(weight), floats(accum), floats(linear), s.rows, rule, current_stream(weight)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("rmsprop_dense_", TORCH_BOX(&rmsprop_dense_));
  m.impl("rmsprop_rows_", TORCH_BOX(&rmsprop_rows_));
  m.impl("rmsprop_settle_", TORCH_BOX(&rmsprop_settle_));
  m.impl("ftrl_dense_", TORCH_BOX(&ftrl_dense_));
  m.impl("ftrl_rows_", TORCH_BOX(&ftrl_rows_));
}

}  // namespace widedeep
