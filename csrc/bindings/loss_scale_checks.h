// Checks that the loss-scale bindings of every device share. Contracts: widedeep/ops/loss_scale.py.
#pragma once
#include "bindings/checks.h"

namespace widedeep {

inline void check_loss_scale_state(const Tensor& scale, const Tensor& good_steps, const Tensor& updates,
                                   const Tensor& found_inf) {
  const char* op = "loss_scale_update_";
  check_scalar(scale, op, "scale", ScalarType::Float, scale);
  check_scalar(good_steps, op, "good_steps", ScalarType::Int, scale);
  check_scalar(updates, op, "updates", ScalarType::Long, scale);
  check_scalar(found_inf, op, "found_inf", ScalarType::Float, scale);
}

}  // namespace widedeep
