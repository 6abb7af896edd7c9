// One bit for each element of a matrix, row-major: column n of a row is bit n % 32 of its word n / 32 (on our machines
// bit n % 8 of byte n / 8); rows are filled up to whole words, with zeros.
#pragma once
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

WD_HOST_DEVICE inline int64_t bit_row_bytes(int64_t columns) { return (columns + 31) / 32 * 4; }

}  // namespace widedeep::core
