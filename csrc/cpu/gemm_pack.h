// Copies of matrix blocks in the order in which the innermost loop of the product reads them.
#pragma once
#include <cstdint>
#include <cstring>

namespace widedeep::cpu {

typedef float Float8 __attribute__((vector_size(32)));
typedef float UnalignedFloat8 __attribute__((vector_size(32), aligned(4), may_alias));

// out[k * width + i] = source[i * stride + k] for k in [0, 8), i in [0, lines), lines <= 8. Writes 8 - lines floats
// more behind each group of lines: groups must be written in the order of memory.
template <int lines>
inline void transpose8(const float* source, int64_t stride, float* out, int64_t width) {
  Float8 a[8] = {}, b[8], c[8];
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) a[i] = *reinterpret_cast<const UnalignedFloat8*>(source + i * stride);
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

// Rows of the source lie pages apart, where no hardware prefetcher follows: packing asks for this many in advance.
inline constexpr int64_t kAhead = 8;

// Copies lines [line, line + lines) x depth [k, k + depth) of a matrix to panels of Width lines, panel[k][Width] each
// and one behind the other; missing lines of the last one are zero. `contiguous`: the lines lie next to each other in
// memory (stride apart along the depth). May write up to 8 floats behind the last panel.
template <int Width>
inline void pack_panels(const float* data, int64_t stride, bool contiguous, int64_t line, int64_t lines, int64_t k,
                        int64_t depth, float* __restrict__ panels) {
  const int64_t whole = lines / Width, rest = lines % Width, size = depth * Width;
  if (contiguous) {
    for (int64_t d = 0; d < depth; ++d) {
      const float* source = data + (k + d) * stride + line;
      float* out = panels + d * Width;
      if (d + kAhead < depth)
        for (int64_t i = 0; i < lines; i += 16) __builtin_prefetch(source + kAhead * stride + i);
      for (int64_t p = 0; p < whole; ++p, source += Width, out += size) std::memcpy(out, source, sizeof(float) * Width);
      if (rest != 0)
        for (int64_t i = 0; i < Width; ++i) out[i] = i < rest ? source[i] : 0.f;
    }
    return;
  }
  constexpr int kTail = Width % 8 == 0 ? 8 : Width % 8;
  for (int64_t p = 0; p <= whole; ++p) {
    const int64_t count = p < whole ? Width : rest;
    const float* source = data + (line + p * Width) * stride + k;
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
      for (int64_t i = 0; i < Width; ++i) out[d * Width + i] = i < count ? source[i * stride + d] : 0.f;
  }
}

}  // namespace widedeep::cpu
