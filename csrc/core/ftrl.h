// FTRL-proximal on one element with learning-rate power -0.5, as TensorFlow's ApplyFtrl.
// Source: McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013.
//   n = accum + g^2;   linear = linear + g - (sqrt(n) - sqrt(accum)) / lr w
//   w = (clamp(linear, -l1, l1) - linear) / (sqrt(n) / lr + 2 l2);   accum = n
#pragma once
#include <cmath>

#include "core/macros.h"

namespace widedeep::core {

struct FtrlRule {
  float lr, l1, l2;
};

WD_HOST_DEVICE inline void ftrl(float& w, float& accum, float& linear, float g, FtrlRule rule) {
  const float n = accum + g * g;
  const float root = sqrtf(n);
  const float z = linear + g - (root - sqrtf(accum)) / rule.lr * w;
  const float clipped = z < -rule.l1 ? -rule.l1 : (z > rule.l1 ? rule.l1 : z);
  const float curvature = root / rule.lr + 2.0f * rule.l2;
  w = curvature == 0.0f ? 0.0f : (clipped - z) / curvature;  // accum started at 0, and nothing was seen but g^2 of 0
  accum = n;
  linear = z;
}

}  // namespace widedeep::core
