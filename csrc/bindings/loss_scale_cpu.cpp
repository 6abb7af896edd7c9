// Loss-scale ops on the CPU. Contracts: widedeep/ops/loss_scale.py.
#include <torch/csrc/stable/library.h>

#include "bindings/loss_scale_checks.h"
#include "bindings/pointers.h"
#include "core/loss_scale.h"
#include "cpu/loss_scale.h"

namespace widedeep {
namespace {

void check_finite_(std::vector<Tensor> tensors, Tensor found_inf) {
  check_scalar(found_inf, "check_finite_", "found_inf", ScalarType::Float, found_inf);
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_contiguous(), "check_finite_: tensors must be contiguous, got ", describe(t));
    const auto type = element_type(t.scalar_type(), "check_finite_", "tensors");
    if (!cpu::all_finite(t.const_data_ptr(), type, t.numel())) *floats(found_inf) = 1.0f;
  }
}

void loss_scale_update_(Tensor scale, Tensor good_steps, Tensor updates, Tensor found_inf, double growth,
                        double backoff, int64_t interval) {
  check_loss_scale_state(scale, good_steps, updates, found_inf);
  core::update_loss_scale(*floats(scale), *ints(good_steps), *longs(updates), *values(found_inf) != 0.0f,
                          static_cast<float>(growth), static_cast<float>(backoff), interval);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) {
  m.impl("check_finite_", TORCH_BOX(&check_finite_));
  m.impl("loss_scale_update_", TORCH_BOX(&loss_scale_update_));
}

}  // namespace widedeep
