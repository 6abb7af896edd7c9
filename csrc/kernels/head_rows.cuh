// How a warp walks the rows of the last hidden activation. Included by head.cu alone.
#pragma once
#include <bit>

#include "kernels/common.cuh"
#include "kernels/head.h"

namespace widedeep::kernels::head_rows {

// Rows past 1024 columns are read again (from the L1 cache) rather than kept: registers hold two sums as long as they
// are.
template <int kVectors>
constexpr bool kKept = kVectors <= 4;

// Rows that a warp works on together: their loads and shuffles overlap. Those of 1024 columns are long enough alone,
// and two of them, the two to come and both sums do not fit the registers.
template <int kVectors>
constexpr int kRows = kVectors < 4 ? 2 : 1;

// Eight elements as a thread keeps them: as words, since halves by themselves would take a register each.
template <typename T>
struct alignas(16) Words {
  uint32_t word[2 * sizeof(T)];

  __device__ __forceinline__ float operator[](int e) const {
    if constexpr (sizeof(T) == 4)
      return std::bit_cast<float>(word[e]);
    else
      return to_float(std::bit_cast<Pack<T, 2>>(word[e / 2]).v[e % 2]);
  }
};

template <typename T, int kVectors>
__device__ __forceinline__ Words<T> load_part(const T* row, int v, int lane, int64_t H) {
  const int column = (v * 32 + lane) * 8;
  if (kKept<kVectors> && H % 8 != 0) return std::bit_cast<Words<T>>(load8(row + column, H - column, false));
  return column < H ? *reinterpret_cast<const Words<T>*>(row + column) : Words<T>{};
}

// kRows neighbouring rows, each with its label and wide logit; zeros in the place of rows past the
// batch.
template <typename T, int kVectors>
struct Turn {
  int64_t first;
  Words<T> part[kRows<kVectors>][kVectors];
  float wide_logit[kRows<kVectors>], label[kRows<kVectors>];

  __device__ __forceinline__ bool real(int r, int64_t B) const { return r == 0 || first + r < B; }

  // labels null: not wanted.
  __device__ __forceinline__ void load(const HeadInputs& in, const float* labels, int64_t row, int lane) {
    first = row;
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r) {
      const T* const h = static_cast<const T*>(in.h) + (first + r) * in.H;
      const bool is_real = real(r, in.B);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) part[r][v] = is_real ? load_part<T, kVectors>(h, v, lane, in.H) : Words<T>{};
      wide_logit[r] = is_real ? in.wide_logit[first + r] : 0.f;
      label[r] = labels && is_real ? labels[first + r] : 0.f;
    }
  }
};

// Calls f(turn) for every turn of this warp, the last rows first: those the layer before has written last, and they lie
// in the L2 cache still; and what f writes last is what the gradients' products read first. Where a row is kept, the
// next turn is under way while f works on one: a row's way (load, sum over the warp, sigmoid, store) is long, and there
// are few warps to fill the time.
template <typename T, int kVectors, typename F>
__device__ __forceinline__ void walk(const HeadInputs& in, const float* labels, int lane, const F& f) {
  const int64_t stride = grid_threads() / 32, turns = (in.B + kRows<kVectors> - 1) / kRows<kVectors>;
  int64_t at = turns - 1 - global_thread() / 32;
  Turn<T, kVectors> turn, next;
  if constexpr (!kKept<kVectors>) {
    for (; at >= 0; at -= stride) {
      turn.load(in, labels, at * kRows<kVectors>, lane);
      f(turn);
    }
    return;
  }
  if (at >= 0) turn.load(in, labels, at * kRows<kVectors>, lane);
  while (at >= 0) {
    at -= stride;
    if (at >= 0) next.load(in, labels, at * kRows<kVectors>, lane);
    f(turn);
    turn = next;
  }
}

}  // namespace widedeep::kernels::head_rows
