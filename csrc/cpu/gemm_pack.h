// Copies of matrix blocks in the order in which the innermost loop of the product reads them.
#pragma once
#include <cstdint>

#include "cpu/element.h"
#include "cpu/transpose.h"

namespace widedeep::cpu {

// Rows of the source lie pages apart, where no hardware prefetcher follows: packing asks for this many in advance.
inline constexpr int64_t kAhead = 8;

// Copies lines [line, line + lines) x depth [k, k + depth) of a matrix to panels of Width lines, panel[k][Width] floats
// each and one behind the other; missing lines of the last one are zero. `contiguous`: the lines lie next to each other
// in memory (stride apart along the depth). May write up to 8 floats behind the last panel.
template <int Width, typename T>
inline void pack_panels(const T* data, int64_t stride, bool contiguous, int64_t line, int64_t lines, int64_t k,
                        int64_t depth, float* __restrict__ panels) {
  const int64_t whole = lines / Width, rest = lines % Width, size = depth * Width;
  if (contiguous) {
    for (int64_t d = 0; d < depth; ++d) {
      const T* source = data + (k + d) * stride + line;
      float* out = panels + d * Width;
      if (d + kAhead < depth)
        for (int64_t i = 0; i < lines; i += 64 / sizeof(T)) __builtin_prefetch(source + kAhead * stride + i);
      for (int64_t p = 0; p < whole; ++p, source += Width, out += size) load_row(source, out, Width);
      if (rest != 0)
        for (int64_t i = 0; i < Width; ++i) out[i] = i < rest ? to_float(source[i]) : 0.f;
    }
    return;
  }
  constexpr int kTail = Width % 8 == 0 ? 8 : Width % 8;
  for (int64_t p = 0; p <= whole; ++p) {
    const int64_t count = p < whole ? Width : rest;
    const T* source = data + (line + p * Width) * stride + k;
    float* out = panels + p * size;
    int64_t d = 0;
    if (count == Width)
      for (; d + 8 <= depth; d += 8) {
        if (p + 1 < whole)  // the next panel
#pragma GCC unroll 16
          for (int i = 0; i < Width; ++i) __builtin_prefetch(source + (Width + i) * stride + d);
        transpose8<kTail>(source + (Width - kTail) * stride + d, stride, out + d * Width + Width - kTail, Width);
#pragma GCC unroll 4
        for (int i = Width - kTail - 8; i >= 0; i -= 8)
          transpose8<8>(source + i * stride + d, stride, out + d * Width + i, Width);
      }
    for (; d < depth && count != 0; ++d)
      for (int64_t i = 0; i < Width; ++i) out[d * Width + i] = i < count ? to_float(source[i * stride + d]) : 0.f;
  }
}

}  // namespace widedeep::cpu
