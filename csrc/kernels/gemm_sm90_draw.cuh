// What dropout keeps, in the order of gemm_sm90_bits.cuh. Included by gemm_sm90_rows.cuh alone.
#pragma once
#include "core/philox.h"
#include "kernels/gemm_sm90_bits.cuh"

namespace widedeep::kernels::sm90 {

// A call serves two rows. kOdd: `row` is the second of two, so that the rows need a call more.
template <typename T, bool kOdd>
__device__ __forceinline__ Bits<T> draw_rows(const core::Dropout& drop, uint32_t row, uint32_t column) {
  constexpr int kCalls = kTogether / 2 + kOdd;
  core::Philox4 calls[kCalls];
  core::dropout_bits(drop, row, column / 8, calls);
  Bits<T> bits{};
#pragma unroll
  for (int i = 0; i < kCalls; ++i) {
    const uint32_t addend = core::dropout_addend(drop.threshold, calls[i]);
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int n = 2 * i + second - kOdd;
      if (n < 0 || n >= kTogether) continue;
      // Each row comes in at the top of the bytes, and the ones before it move down.
      const auto add = [&](uint32_t& word, uint32_t random) {
        word = word >> 1 | (core::dropout_signs(random, addend) & 0x80808080u);
      };
      const uint32_t lower = calls[i].word[second * 2], upper = calls[i].word[second * 2 + 1];
      if constexpr (kHalf<T>)
        add(bits.v[0], lower), add(bits.v[1], upper);
      else
        add(bits.v[0], column & 4 ? upper : lower);
    }
  }
  return bits;
}

// The bits of the lane whose columns begin with `column`, of kTogether rows from `row` on.
template <typename T>
__device__ __forceinline__ Bits<T> draw(const core::Dropout& drop, uint32_t row, uint32_t column) {
  return row % 2 == 0 ? draw_rows<T, false>(drop, row, column) : draw_rows<T, true>(drop, row, column);
}

}  // namespace widedeep::kernels::sm90
