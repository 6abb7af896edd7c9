// Transposes eight rows of eight in registers, to float.
#pragma once
#include <cstdint>

#include "cpu/element.h"

namespace widedeep::cpu {

typedef float Float8 __attribute__((vector_size(32)));
typedef float UnalignedFloat8 __attribute__((vector_size(32), aligned(4), may_alias));

template <typename T>
inline Float8 load8(const T* source) {
  Float8 out = {};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) out[i] = to_float(source[i]);
  return out;
}
template <>
inline Float8 load8(const float* source) {
  return *reinterpret_cast<const UnalignedFloat8*>(source);
}

// out[k * width + i] = source[i * stride + k] for k in [0, 8), i in [0, lines), lines <= 8. Writes 8 - lines floats
// more behind each group of lines: groups must be written in the order of memory.
template <int lines, typename T>
inline void transpose8(const T* source, int64_t stride, float* out, int64_t width) {
  Float8 a[8] = {}, b[8], c[8];
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) a[i] = load8(source + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      c[h + 2 * j] = __builtin_shufflevector(b[h + j], b[h + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      c[h + 2 * j + 1] = __builtin_shufflevector(b[h + j], b[h + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const Float8 row = k < 4 ? __builtin_shufflevector(c[k], c[k + 4], 0, 1, 2, 3, 8, 9, 10, 11)
                             : __builtin_shufflevector(c[k - 4], c[k], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<UnalignedFloat8*>(out + k * width) = row;
  }
}

}  // namespace widedeep::cpu
