// A transposed copy of a matrix, row-major and contiguous: to [columns, rows] = from [rows, columns]^T.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/parallel.h"

namespace widedeep::cpu {

constexpr int64_t kTransposed = 32;  // rows and columns of a tile: a cache line of two-byte elements

typedef uint16_t Short8 __attribute__((vector_size(16)));
typedef uint32_t Int4 __attribute__((vector_size(16)));
typedef uint64_t Long2 __attribute__((vector_size(16)));

// Eight rows of eight elements in registers: pairs of neighbours are exchanged, of elements, then of pairs, of fours.
inline void transpose8(const uint16_t* from, int64_t stride, uint16_t* to, int64_t width) {
  Short8 a[8];
  Int4 b[8];
  Long2 c[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) std::memcpy(&a[i], from + i * stride, sizeof a[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = (Int4)__builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
    b[i + 1] = (Int4)__builtin_shufflevector(a[i], a[i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      c[i + 2 * j] = (Long2)__builtin_shufflevector(b[i + j], b[i + j + 2], 0, 4, 1, 5);
      c[i + 2 * j + 1] = (Long2)__builtin_shufflevector(b[i + j], b[i + j + 2], 2, 6, 3, 7);
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Long2 even = __builtin_shufflevector(c[k], c[k + 4], 0, 2),
                odd = __builtin_shufflevector(c[k], c[k + 4], 1, 3);
    std::memcpy(to + 2 * k * width, &even, sizeof even);
    std::memcpy(to + (2 * k + 1) * width, &odd, sizeof odd);
  }
}

// A whole tile. Through a buffer, so that each line of `to` is written at once: its rows may lie a power of two apart,
// where few of them fit a cache together.
inline void transpose_tile(const uint16_t* from, int64_t stride, uint16_t* to, int64_t width) {
  alignas(64) uint16_t tile[kTransposed][kTransposed];
  for (int64_t r = 0; r < kTransposed; r += 8)
    for (int64_t c = 0; c < kTransposed; c += 8) transpose8(from + r * stride + c, stride, &tile[c][r], kTransposed);
  for (int64_t c = 0; c < kTransposed; ++c) std::memcpy(to + c * width, tile[c], sizeof tile[c]);
}

inline void transpose_tile(const uint32_t* from, int64_t stride, uint32_t* to, int64_t width) {
  for (int64_t c = 0; c < kTransposed; ++c)
    for (int64_t r = 0; r < kTransposed; ++r) to[c * width + r] = from[r * stride + c];
}

template <typename T>
void transpose(const T* from, T* to, int64_t rows, int64_t columns) {
  parallel_for(0, (rows + kTransposed - 1) / kTransposed, 1, [=](int64_t first, int64_t last) {
    for (int64_t row = first * kTransposed; row < std::min(rows, last * kTransposed); row += kTransposed)
      for (int64_t column = 0; column < columns; column += kTransposed) {
        const int64_t end_row = row + kTransposed, end_column = column + kTransposed;
        if (end_row <= rows && end_column <= columns) {
          transpose_tile(from + row * columns + column, columns, to + column * rows + row, rows);
          continue;
        }
        for (int64_t c = column; c < std::min(columns, end_column); ++c)
          for (int64_t r = row; r < std::min(rows, end_row); ++r) to[c * rows + r] = from[r * columns + c];
      }
  });
}

}  // namespace widedeep::cpu
