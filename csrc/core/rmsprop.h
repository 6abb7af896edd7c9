// RMSprop on one element, as the original (Keras' legacy RMSprop, TensorFlow 2.3): no momentum, epsilon outside the
// root.
//   rms = rho rms + (1 - rho) g^2;   w = w - lr g / (sqrt(rms) + eps)
// Rows of a table follow the same rule, and rms of every other row decays by rho too. No pass over the table is needed
// for that: a row remembers the step of its last update and is multiplied by rho^missed when it is next touched. Steps
// are numbered by the updates made: one that was skipped for an overflow decays nothing and takes no number.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

struct RmspropRule {
  float lr, rho, eps;
};

// decay: of rms before this step's own, from rmsprop_catch_up; 1 for dense parameters.
WD_HOST_DEVICE inline void rmsprop(float& w, float& rms, float g, float decay, RmspropRule rule) {
  rms = rule.rho * (decay * rms) + (1.0f - rule.rho) * (g * g);
  w -= rule.lr * g / (sqrtf(rms) + rule.eps);
}

// base^exponent by squaring: exact where every power is a float (0.5^k, down to the smallest denormal, then 0).
WD_HOST_DEVICE inline float power(float base, uint64_t exponent) {
  float result = 1.0f;
  for (; exponent != 0 && base != 0.0f; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return exponent != 0 ? 0.0f : result;
}

// rho^missed for a row last updated in step last_step that is touched in `step`. A row never updated has rms 0, so any
// last_step < step serves for it.
WD_HOST_DEVICE inline float rmsprop_catch_up(int64_t step, int64_t last_step, float rho) {
  const int64_t missed = step - last_step - 1;
  return missed > 0 ? power(rho, static_cast<uint64_t>(missed)) : 1.0f;
}

}  // namespace widedeep::core
