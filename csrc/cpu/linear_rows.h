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

// What each of the kStrip columns from `column` (a multiple of 32) on is multiplied by: the scale, or 0 when dropped.
inline void dropout_factors(const core::Dropout& dropout, uint32_t row, int64_t column, float* __restrict__ factor) {
  static_assert(std::endian::native == std::endian::little, "low bytes come first in memory");
  alignas(64) uint32_t signs[2][kCalls];
  const core::Dropout d = dropout;  // a copy cannot alias the words
  const auto first = static_cast<uint32_t>(column / 8);
  const bool odd = row % 2 != 0;
  for (uint32_t i = 0; i < kCalls; ++i) {
    const core::Philox4 bits = core::dropout_bits(d, row, first + i);
    const uint32_t addend = core::dropout_addend(d.threshold, bits);
    for (int j = 0; j < 2; ++j) signs[j][i] = core::dropout_signs(odd ? bits.word[2 + j] : bits.word[j], addend);
  }
  // Word j of a call's row holds its columns 4 j ... 4 j + 3, in order.
  for (int call = 0; call < kCalls; ++call) {
    int8_t kept[8];
    for (int j = 0; j < 2; ++j) std::memcpy(kept + 4 * j, &signs[j][call], 4);
    for (int i = 0; i < 8; ++i) factor[call * 8 + i] = kept[i] < 0 ? d.scale : 0.f;
  }
}

// The same of rows `row` and row + 1, row being even, and more columns at a time: a call serves both rows, and a vector
// has a lane for each call.
constexpr int kWideStrip = 128;

inline void dropout_factors_of_two(const core::Dropout& dropout, uint32_t row, int64_t column,
                                   float (*factor)[kWideStrip]) {
  constexpr int kWideCalls = kWideStrip / 8;
  alignas(64) uint32_t signs[2][kWideCalls][2];
  alignas(64) int8_t kept[2][kWideStrip];
  const core::Dropout d = dropout;  // a copy cannot alias the words
  const auto first = static_cast<uint32_t>(column / 8);
  for (uint32_t i = 0; i < kWideCalls; ++i) {
    const core::Philox4 bits = core::dropout_bits(d, row, first + i);
    const uint32_t addend = core::dropout_addend(d.threshold, bits);
    for (int r = 0; r < 2; ++r)
      for (int j = 0; j < 2; ++j) signs[r][i][j] = core::dropout_signs(bits.word[2 * r + j], addend);
  }
  std::memcpy(kept, signs, sizeof kept);
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < kWideStrip; ++i) factor[r][i] = kept[r][i] < 0 ? d.scale : 0.f;
}

// NaN stays NaN where it is kept, so that a run that diverges says so.
inline float activate(float z, float factor) {
  const float kept = (z < 0.f ? 0.f : z) * factor;
  return factor == 0.f ? 0.f : kept;
}

// One row's columns [column, column + n), `column` a multiple of 32. z and y may be equal, element by element.
template <typename Z, typename Y>
void activate_row(const Z* z, const float* __restrict__ bias, int64_t n, int64_t column, uint32_t row,
                  const core::Dropout& dropout, Y* y) {
  alignas(64) float factor[kStrip];
  std::fill_n(factor, kStrip, 1.f);
  for (int64_t first = 0; first < n; first += kStrip) {
    if (dropout.threshold != 0) dropout_factors(dropout, row, column + first, factor);
    const int64_t count = std::min<int64_t>(kStrip, n - first);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i)
      store(activate(to_float(z[first + i]) + bias[first + i], factor[i]), y[first + i]);
  }
}

// Whole rows `row` .. row + rows of a matrix [*, n], in place; rows at most 2, row even where they are 2.
template <typename T>
void activate_rows(T* z, const float* __restrict__ bias, int64_t n, uint32_t row, int rows,
                   const core::Dropout& dropout) {
  alignas(64) float factor[2][kWideStrip];
  for (auto& of_row : factor) std::fill_n(of_row, kWideStrip, 1.f);
  for (int64_t first = 0; first < n; first += kWideStrip) {
    if (dropout.threshold != 0) dropout_factors_of_two(dropout, row & ~1u, first, factor);
    const int64_t count = std::min<int64_t>(kWideStrip, n - first);
    for (int r = 0; r < rows; ++r) {
      const float* const by = factor[(row + r) & 1];
      T* const at = z + r * n + first;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) store(activate(to_float(at[i]) + bias[first + i], by[i]), at[i]);
    }
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
