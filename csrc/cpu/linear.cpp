#include "cpu/linear.h"

#include <algorithm>
#include <type_traits>

#include "core/bits.h"
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

constexpr int64_t kBlockRows = 64;      // rows whose column sums are taken together
constexpr int64_t kAhead = 8;           // rows that are asked for in advance
constexpr int kPartialSums = 2;         // gemm_scratch slot
constexpr int64_t kElements = 1 << 14;  // elements below which a second thread does not pay

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
    for_pairs(first_row + t.row, 0, t.rows, [&](int64_t r, bool two) {
      for (int64_t ahead = r + kAhead; ahead < std::min(t.rows, r + kAhead + 1 + two); ++ahead)
        prefetch(t.c + ahead * t.stride, t.columns);
      const int64_t row = t.row + r;
      T* const out = y + row * size.O + t.column;
      activate_rows(Rows<float, T>{t.c + r * t.stride, t.stride, out, size.O}, two, bias + t.column, t.columns,
                    t.column, static_cast<uint32_t>(first_row + row), dropout);
      for (int64_t i = 0; bits != nullptr && i < 1 + two; ++i)
        store_bits(out + i * size.O, t.columns, t.column, bits + (row + i) * core::bit_row_bytes(size.O));
    });
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
    using T = std::remove_pointer_t<decltype(t)>;
    T* const rows = static_cast<T*>(z);
    parallel_for(0, B, kElements / std::max<int64_t>(O, 1) + 1, [&](int64_t first, int64_t last) {
      for_pairs(first_row, first, last, [&](int64_t b, bool two) {
        T* const out = rows + b * O;
        activate_rows(Rows<T, T>{out, O, out, O}, two, bias, O, 0, static_cast<uint32_t>(first_row + b), dropout);
        for (int64_t i = 0; bits != nullptr && i < 1 + two; ++i)
          store_bits(out + i * O, O, 0, bits + (b + i) * core::bit_row_bytes(O));
      });
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
          if (mask.values != nullptr || mask.bits != nullptr)
            mask_row(in + b * O, mask, b, O, 0, scale, out + b * O, sums, O);
          else
            add_row(in + b * O, sums, O);
        }
      }
    });
  });
  if (dbias != nullptr) add_partials(partial, blocks, O, dbias);
}

}  // namespace widedeep::cpu
