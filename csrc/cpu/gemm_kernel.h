// The innermost loop of the matrix product, once for all vector widths.
#pragma once
#include <cstdint>

namespace widedeep::cpu {

// Register tile: kRows x (kVectors vectors). The accumulators, one row of B and a broadcast of A fill the register
// file.
#if defined(__AVX512F__)
inline constexpr const char* kInstructions = "AVX-512 matrix kernel";
inline constexpr int kLanes = 16, kRows = 14, kVectors = 2;
#elif defined(__AVX2__) && defined(__FMA__)
inline constexpr const char* kInstructions = "AVX2 matrix kernel";
inline constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
// A sixth row would fit too, but g++ 12 loads the whole column of A first, and then spills.
inline constexpr const char* kInstructions = "NEON matrix kernel";
inline constexpr int kLanes = 4, kRows = 5, kVectors = 4;
#else
inline constexpr const char* kInstructions = "portable matrix kernel";
inline constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
inline constexpr int kColumns = kLanes * kVectors;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }

// C tile [kRows, kColumns] = (or +=) a panel [depth, kRows] times a panel [depth, kColumns].
template <bool Accumulate>
inline void multiply_tile(int64_t depth, const float* __restrict__ a, const float* __restrict__ b,
                          float* __restrict__ c, int64_t stride) {
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(c + i * stride, 1, 3);
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * kColumns + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = a[k * kRows + i] - Vector{};
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* p = c + i * stride + j * kLanes;
      store(p, Accumulate ? load(p) + sum[i][j] : sum[i][j]);
    }
}

}  // namespace widedeep::cpu
