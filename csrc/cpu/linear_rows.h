// One row of a linear layer's epilogues, forward and backward, for loops over rows that the compiler vectorises.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/philox.h"
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/linear.h"

namespace widedeep::cpu {

constexpr int kStrip = kTileColumns;  // columns that draw their dropout bits at once
constexpr int kCalls = kStrip / 8;    // the Philox calls this takes: independent lanes for the vectoriser

// Rows of a tile lie pages apart, where no hardware prefetcher follows.
template <typename T>
void prefetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// What each of the kStrip columns from `column` (a multiple of 8) on is multiplied by in rows `row`, which is even, and
// row + 1: the scale, or 0 when dropped. A call serves both rows.
inline void dropout_factors(const core::Dropout& dropout, uint32_t row, int64_t column, float (*factor)[kStrip]) {
  static_assert(std::endian::native == std::endian::little, "low bytes come first in memory");
  alignas(64) uint32_t signs[2][kCalls][2];
  alignas(64) int8_t kept[2][kStrip];
  const core::Dropout d = dropout;  // a copy cannot alias the words
  const auto first = static_cast<uint32_t>(column / 8);
  for (uint32_t i = 0; i < kCalls; ++i) {
    const core::Philox4 bits = core::dropout_bits(d, row, first + i);
    const uint32_t addend = core::dropout_addend(d.threshold, bits);
    for (int r = 0; r < 2; ++r)
      for (int j = 0; j < 2; ++j) signs[r][i][j] = core::dropout_signs(bits.word[2 * r + j], addend);
  }
  std::memcpy(kept, signs, sizeof kept);  // word j of a call's row holds its columns 4 j ... 4 j + 3, in order
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < kStrip; ++i) factor[r][i] = kept[r][i] < 0 ? d.scale : 0.f;
}

// NaN stays NaN where it is kept, so that a run that diverges says so.
inline float activate(float z, float factor) {
  const float kept = (z < 0.f ? 0.f : z) * factor;
  return factor == 0.f ? 0.f : kept;
}

// Rows whose first columns are z, and y, and the floats between them; z and y may be equal, element by element.
template <typename Z, typename Y>
struct Rows {
  const Z* z;
  int64_t z_stride;
  Y* y;
  int64_t y_stride;
};

// Rows row and, if `two`, row + 1, row then being even; columns [column, column + n), `column` a multiple of 8.
template <typename Z, typename Y>
void activate_rows(const Rows<Z, Y>& rows, bool two, const float* __restrict__ bias, int64_t n, int64_t column,
                   uint32_t row, const core::Dropout& dropout) {
  alignas(64) float factor[2][kStrip];
  for (auto& of_row : factor) std::fill_n(of_row, kStrip, 1.f);
  for (int64_t first = 0; first < n; first += kStrip) {
    if (dropout.threshold != 0) dropout_factors(dropout, row & ~1u, column + first, factor);
    const int64_t count = std::min<int64_t>(kStrip, n - first);
    for (uint32_t r = 0; r < 1u + two; ++r) {
      const float* const by = factor[(row + r) & 1];
      const Z* const z = rows.z + r * rows.z_stride + first;
      Y* const y = rows.y + r * rows.y_stride + first;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) store(activate(to_float(z[i]) + bias[first + i], by[i]), y[i]);
    }
  }
}

// Calls use(row, two) for all of [first, last), two rows at a time where a dropout call serves both: `offset` plus the
// first of them is even.
template <typename Use>
void for_pairs(int64_t offset, int64_t first, int64_t last, const Use& use) {
  for (int64_t row = first; row < last;) {
    const bool two = (offset + row) % 2 == 0 && row + 1 < last;
    use(row, two);
    row += 1 + two;
  }
}

// Whether y > 0, of the columns from `column` (a multiple of 32) on, into the row's bits: whole words.
template <typename Y>
void store_bits(const Y* y, int64_t n, int64_t column, uint8_t* bits) {
  uint8_t* to = bits + column / 8;
  for (int64_t first = 0; first < core::bit_row_bytes(n) * 8; first += 8) {
    uint8_t byte = 0;
    for (int64_t i = first; i < std::min(n, first + 8); ++i)
      byte |= static_cast<uint8_t>((to_float(y[i]) > 0.f) << (i - first));
    to[first / 8] = byte;
  }
}

// One row times its mask, added to `sums`. The pointers may be equal, element by element.
template <typename D, typename T, typename Keep>
void mask_row(const D* dy, const Keep& keep, float scale, T* dz, float* __restrict__ sums, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float kept = to_float(dy[i]) * scale;  // of every element: a choice of values vectorises, a load does not
    const float value = keep(i) ? kept : 0.f;
    sums[i] += value;
    store(value, dz[i]);
  }
}

// Row b of a mask [*, columns], from `column` (a multiple of 8) on.
template <typename D, typename T>
void mask_row(const D* dy, const Mask& mask, int64_t b, int64_t columns, int64_t column, float scale, T* dz,
              float* __restrict__ sums, int64_t n) {
  if (mask.bits != nullptr) {
    const uint8_t* bits = mask.bits + b * core::bit_row_bytes(columns) + column / 8;
    mask_row(dy, [=](int64_t i) { return (bits[i / 8] >> (i % 8) & 1) != 0; }, scale, dz, sums, n);
  } else {
    const T* values = static_cast<const T*>(mask.values) + b * columns + column;
    mask_row(dy, [=](int64_t i) { return to_float(values[i]) > 0.f; }, scale, dz, sums, n);
  }
}

template <typename T>
void add_row(const T* dy, float* __restrict__ sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += to_float(dy[i]);
}

}  // namespace widedeep::cpu
