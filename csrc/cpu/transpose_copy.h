// A transposed copy of a matrix, row-major and contiguous: to [columns, rows] = from [rows, columns]^T.
#pragma once
#include <cstdint>

namespace widedeep::cpu {

template <typename T>
void transpose(const T* from, T* to, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 32;  // of which both sides fit a first-level cache
  for (int64_t row = 0; row < rows; row += kTile)
    for (int64_t column = 0; column < columns; column += kTile)
      for (int64_t c = column; c < columns && c < column + kTile; ++c)
        for (int64_t r = row; r < rows && r < row + kTile; ++r) to[c * rows + r] = from[r * columns + c];
}

}  // namespace widedeep::cpu
