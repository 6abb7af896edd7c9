// Whether gradients are finite, for the dynamic loss scale.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace widedeep::cpu {

// False when any of n elements is infinite or NaN.
bool all_finite(const void* values, core::DType type, int64_t n);

}  // namespace widedeep::cpu
