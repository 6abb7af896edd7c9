// Dynamic loss scale: halved (never below 1) after a step whose gradients overflowed, doubled after `interval` good
// ones in a row. `updates` counts the steps that were not skipped. Source: Micikevicius et al., "Mixed Precision
// Training", ICLR 2018, section 3.2.
#pragma once
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

WD_HOST_DEVICE inline void update_loss_scale(float& scale, int32_t& good_steps, int64_t& updates, bool found_inf,
                                             float growth, float backoff, int64_t interval) {
  if (found_inf) {
    scale = scale * backoff > 1.0f ? scale * backoff : 1.0f;
    good_steps = 0;
    return;
  }
  ++updates;
  if (++good_steps >= interval) {
    const float grown = scale * growth;
    if (grown <= 3.402823466e38f) scale = grown;
    good_steps = 0;
  }
}

}  // namespace widedeep::core
