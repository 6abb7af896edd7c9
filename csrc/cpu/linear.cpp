#include "cpu/linear.h"

#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/bits.h"
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

constexpr int kStrip = kTileColumns;    // columns that draw their dropout bits at once
constexpr int kCalls = kStrip / 8;      // the Philox calls this takes: independent lanes for the vectoriser
constexpr int64_t kBlockRows = 64;      // rows whose column sums are taken together
constexpr int64_t kAhead = 8;           // rows that are asked for in advance
constexpr int kPartialSums = 2;         // gemm_scratch slot
constexpr int64_t kElements = 1 << 14;  // elements below which a second thread does not pay

// Rows of a tile lie pages apart, where no hardware prefetcher follows.
template <typename T>
void prefetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// What each of the kStrip columns from `column` (a multiple of 32) on is multiplied by: the scale, or 0 when dropped.
void dropout_factors(const core::Dropout& dropout, uint32_t row, int64_t column, float* __restrict__ factor) {
  static_assert(std::endian::native == std::endian::little, "low halves come first in memory");
  alignas(64) uint32_t words[4][kCalls];
  const core::Dropout d = dropout;  // a copy cannot alias the words
  const auto first = static_cast<uint32_t>(column / 8);
  for (uint32_t i = 0; i < kCalls; ++i) {
    const core::Philox4 bits = core::dropout_bits(d, row, first + i);
    for (int j = 0; j < 4; ++j) words[j][i] = bits.word[j];
  }
  // Word j of four neighbouring calls holds the bits of columns 8 j ... 8 j + 7 of a group of 32, in order.
  for (int group = 0; group < kCalls / 4; ++group)
    for (int j = 0; j < 4; ++j) {
      uint16_t halves[8];
      std::memcpy(halves, words[j] + group * 4, sizeof halves);
      for (int i = 0; i < 8; ++i) factor[group * 32 + j * 8 + i] = halves[i] >= d.threshold ? d.scale : 0.f;
    }
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

// out[n] = sum over blocks, in order, of partial[blocks, n].
void add_partials(const float* partial, int64_t blocks, int64_t n, float* out) {
  std::fill_n(out, n, 0.f);
  for (int64_t block = 0; block < blocks; ++block) add_row(partial + block * n, out, n);
}

// Results of a half type leave the tile, which is float, through the epilogue; floats are finished where they are.
template <typename T>
float* in_place(T* out) {
  if constexpr (std::is_same_v<T, float>) return out;
  return nullptr;
}

template <typename T>
void forward(const LinearSize& size, MatrixView x, MatrixView weight, const float* bias, const core::Dropout& dropout,
             int64_t first_row, T* y, uint8_t* bits) {
  gemm(size.B, size.O, size.I, x, weight, in_place(y), size.O, [&](const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) {
      if (r + kAhead < t.rows) prefetch(t.c + (r + kAhead) * t.stride, t.columns);
      const int64_t row = t.row + r;
      activate_row(t.c + r * t.stride, bias + t.column, t.columns, t.column, static_cast<uint32_t>(first_row + row),
                   dropout, y + row * size.O + t.column);
      if (bits != nullptr)
        store_bits(y + row * size.O + t.column, t.columns, t.column, bits + row * core::bit_row_bytes(size.O));
    }
  });
}

template <typename T>
void dgrad(const LinearSize& size, MatrixView dz, MatrixView weight, const Mask& mask, float scale, T* dx,
           float* dbias) {
  const bool masked = mask.values != nullptr || mask.bits != nullptr;
  const T* values = static_cast<const T*>(mask.values);
  const int64_t blocks = gemm_blocks(size.B);
  float* partial = gemm_scratch(kPartialSums, blocks * size.I);
  Epilogue epilogue;
  if (masked || dbias != nullptr || in_place(dx) == nullptr)
    epilogue = [&](const Tile& t) {
      float* sums = partial + t.block * size.I + t.column;
      std::fill_n(sums, t.columns, 0.f);
      for (int64_t r = 0; r < t.rows; ++r) {
        const float* row = t.c + r * t.stride;
        const int64_t at = (t.row + r) * size.I + t.column;
        if (r + kAhead < t.rows) prefetch(row + kAhead * t.stride, t.columns);
        if (!masked) {
          add_row(row, sums, t.columns);
          if (in_place(dx) == nullptr) store_row(row, dx + at, t.columns);
          continue;
        }
        if (values != nullptr && r + kAhead < t.rows) prefetch(values + at + kAhead * size.I, t.columns);
        mask_row(row, mask, t.row + r, size.I, t.column, scale, dx + at, sums, t.columns);
      }
    };
  gemm(size.B, size.I, size.O, dz, weight, in_place(dx), size.I, epilogue);
  if (dbias != nullptr) add_partials(partial, blocks, size.I, dbias);
}

}  // namespace

void linear_forward(core::DType type, const LinearSize& size, const void* x, const void* weight, const float* bias,
                    const core::Dropout& dropout, int64_t first_row, void* y, uint8_t* bits) {
  visit(type, [&](auto* t) {
    forward(size, {x, type, size.I, false}, {weight, type, size.I, true}, bias, dropout, first_row,
            static_cast<decltype(t)>(y), bits);
  });
}

void linear_dgrad(core::DType type, const LinearSize& size, const void* dz, const void* weight, const Mask& mask,
                  float scale, void* dx, float* dbias) {
  visit(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    dgrad(size, {dz, type, size.O, false}, {weight, type, size.I, false}, mask, scale, static_cast<T*>(dx), dbias);
  });
}

void linear_wgrad(core::DType type, const LinearSize& size, const void* dz, const void* x, float* dweight) {
  gemm(size.O, size.I, size.B, {dz, type, size.O, true}, {x, type, size.I, false}, dweight, size.I);
}

void bias_relu_dropout(core::DType type, void* z, const float* bias, int64_t B, int64_t O, const core::Dropout& dropout,
                       int64_t first_row, uint8_t* bits) {
  visit(type, [&](auto* t) {
    auto* rows = static_cast<decltype(t)>(z);
    parallel_for(0, B, kElements / std::max<int64_t>(O, 1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        activate_row(rows + b * O, bias, O, 0, static_cast<uint32_t>(first_row + b), dropout, rows + b * O);
        if (bits != nullptr) store_bits(rows + b * O, O, 0, bits + b * core::bit_row_bytes(O));
      }
    });
  });
}

void mask_and_sum(core::DType type, const void* dy, const Mask& mask, float scale, void* dz, float* dbias, int64_t B,
                  int64_t O) {
  const int64_t blocks = (B + kBlockRows - 1) / kBlockRows;
  float* partial = gemm_scratch(kPartialSums, blocks * O);
  visit(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* in = static_cast<const T*>(dy);
    T* out = static_cast<T*>(dz);
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        float* sums = partial + block * O;
        std::fill_n(sums, O, 0.f);
        for (int64_t b = block * kBlockRows; b < std::min(B, (block + 1) * kBlockRows); ++b) {
          if (mask.values != nullptr || mask.bits != nullptr) {
            mask_row(in + b * O, mask, b, O, 0, scale, out + b * O, sums, O);
          } else {
            add_row(in + b * O, sums, O);
            if (out != in) std::copy_n(in + b * O, O, out + b * O);
          }
        }
      }
    });
  });
  if (dbias != nullptr) add_partials(partial, blocks, O, dbias);
}

}  // namespace widedeep::cpu
