// What follows the product in the Hopper layers: each thread finishes the 128 accumulators of its tile, stages them in
// shared memory and stores whole rows. Included by gemm_sm90.cu alone.
#pragma once
#include <type_traits>

#include "core/philox.h"
#include "kernels/common.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/sm90.cuh"

namespace widedeep::kernels::sm90 {

constexpr int kTile = 128;  // rows and columns of a tile of C
constexpr int kDepth = 64;  // K per stage: 128 bytes, one swizzle row
constexpr int kStages = 5;  // 5 x 32 KB beside 38 KB for the epilogues: what 227 KB allow
constexpr int kCluster = 2;
constexpr int kThreads = 3 * 128;
constexpr int kStageBytes = 2 * kTile * kDepth * 2;
constexpr int kPitch = kTile + 8;  // staged rows are 272 bytes apart: no bank conflicts in either direction

struct Shared {
  alignas(1024) uint8_t stages[kStages][kStageBytes];
  alignas(16) uint16_t staged[2][4][16][kPitch];  // [warpgroup][warp][row][column]
  float sums[2][4][kTile];
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t order[2];  // of each warpgroup: the other has issued its tile
};

struct Params {
  int M, N;
  int depth_blocks;    // ceil(K / kDepth)
  int tiles_n, tiles;  // cluster tiles: 256 rows x 128 columns, columns fastest
  void* c;
  const void* bias;
  uint4* mask;
  float *column_sums, *found_inf;
  DropoutArgs dropout;
  float scale;
};

enum class Epilogue { kForward, kGradient };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Bits 15 and 31: whether the halves of a pair are infinite or NaN.
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C007C00u : 0x7F807F80u;
  return (pair & kExponent) + (0x80008000u - kExponent);
}

// Bits 15 and 31: whether the halves of a pair are nonzero. For that a half's sign does not count.
__device__ __forceinline__ uint32_t nonzero(uint32_t pair) {
  return ((pair & 0x7FFF7FFFu) + 0x7FFF7FFFu) & 0x80008000u;
}

// The 16 rows that a warp has staged go out as whole 256-byte rows.
template <typename T>
__device__ __forceinline__ void store_rows(const uint16_t (*staged)[kPitch], const Params& p, int row, int column) {
  const int lane = threadIdx.x % 32, at = column + lane % 16 * 8;
  const int rows = at < p.N ? p.M - row : 0;
  T* const to = static_cast<T*>(p.c) + int64_t{row} * p.N + at;
  __syncwarp();
#pragma unroll
  for (int pass = 0; pass < 8; ++pass) {
    const int local = pass * 2 + lane / 16;
    const uint4 values = *reinterpret_cast<const uint4*>(&staged[local][lane % 16 * 8]);
    store_if(to + int64_t{local} * p.N, values, local < rows);
  }
  __syncwarp();
}

template <typename T, bool kDrop>
__device__ __forceinline__ void finish_forward(Shared& s, float (&acc)[2][64], const Params& p, int tile_m,
                                               int tile_n) {
  // Built anew for each tile: kept across the product it would cost registers that the accumulators need.
  const uint64_t step = kDrop ? static_cast<uint64_t>(*p.dropout.step) : 0;
  const core::Dropout drop{static_cast<uint32_t>(p.dropout.seed),
                           static_cast<uint32_t>(p.dropout.seed >> 32),
                           static_cast<uint32_t>(step),
                           static_cast<uint32_t>(step >> 32),
                           p.dropout.layer << 24,
                           p.dropout.threshold,
                           p.dropout.scale};
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int quad = lane % 4, row_in_warp = lane / 4;
  const int column = tile_n * kTile, left = p.N - column - quad * 2;
  const T* const bias = static_cast<const T*>(p.bias) + column + quad * 2;
  uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile_m * kTile + half * 64 + warp * 16;
    const uint32_t counter = p.dropout.first_row + static_cast<uint32_t>(row) + row_in_warp;
#pragma unroll
    for (int block = 0; block < 4; ++block) {  // 32 columns, of which one Philox call serves those of a thread in a row
      if (column + block * 32 >= p.N) break;
      uint32_t offsets[4];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const int at = (block * 4 + slot) * 8;
        offsets[slot] = load_or_zero(bias + at, left > at);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        core::Philox4 random{};
        if (kDrop) random = core::dropout_bits(drop, counter + 8 * i, (column / 32 + block) * 4 + quad);
#pragma unroll
        for (int slot = 0; slot < 4; ++slot) {
          const int j = block * 4 + slot;
          const auto offset = reinterpret_cast<const Pack<T, 2>&>(offsets[slot]);
          float y[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float z = acc[half][j * 4 + i * 2 + e] + to_float(offset.v[e]);
            const bool kept = !kDrop || (random.word[slot] >> (16 * e) & 0xFFFFu) >= drop.threshold;
            y[e] = fmaf(z < 0.f || !kept ? 0.f : z, kDrop ? drop.scale : 1.f, 0.f);  // NaN passes; + 0 turns -0 into 0
          }
          const uint32_t stored = pack<T>(y[0], y[1]);
          bits[half * 2 + i] |= nonzero(stored) >> (15 - j);
          *reinterpret_cast<uint32_t*>(&s.staged[group][warp][row_in_warp + 8 * i][j * 8 + quad * 2]) = stored;
        }
      }
    }
    store_rows<T>(s.staged[group][warp], p, row, column);
  }
  if (p.mask)
    p.mask[(int64_t{tile_m} * p.tiles_n + tile_n) * 128 + threadIdx.x % 128] =
        make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// 32 values a thread, summed over the eight lanes that hold other rows of the same columns. Each exchange halves what a
// lane keeps; afterwards slot i of a lane is value (lane & 16) + (lane & 8) + (lane & 4) + i.
template <int kWidth>
__device__ __forceinline__ void sum_over_rows(float (&v)[32]) {
  const bool upper = threadIdx.x & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float kept = upper ? v[i + kWidth] : v[i], sent = upper ? v[i] : v[i + kWidth];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kWidth);
  }
  if constexpr (kWidth > 4) sum_over_rows<kWidth / 2>(v);
}

template <typename T, bool kMasked>
__device__ __forceinline__ void finish_gradient(Shared& s, float (&acc)[2][64], const Params& p, uint4 mask, int tile_m,
                                                int tile_n) {
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int quad = lane % 4, row_in_warp = lane / 4;
  const uint32_t bits[4] = {mask.x, mask.y, mask.z, mask.w};
  uint32_t bad = 0;
  float sums[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sums[i] = 0.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          v[e] = acc[half][j * 4 + i * 2 + e] * p.scale;
          if (kMasked && !(bits[half * 2 + i] >> (e * 16 + j) & 1)) v[e] = 0.f;
          sums[j * 2 + e] += v[e];
        }
        const uint32_t stored = pack<T>(v[0], v[1]);
        if (!kMasked) bad |= not_finite<T>(stored);
        *reinterpret_cast<uint32_t*>(&s.staged[group][warp][row_in_warp + 8 * i][j * 8 + quad * 2]) = stored;
      }
    }
    store_rows<T>(s.staged[group][warp], p, tile_m * kTile + half * 64 + warp * 16, tile_n * kTile);
  }
  if (!kMasked && p.found_inf && (bad & 0x80008000u)) *p.found_inf = 1.f;  // every writer writes the same
  if (!p.column_sums) return;
  sum_over_rows<16>(sums);
  const int first = lane & 28;
#pragma unroll
  for (int i = 0; i < 4; ++i) s.sums[group][warp][(first + i) / 2 * 8 + quad * 2 + (first + i) % 2] = sums[i];
  named_barrier(1 + group, 128);
  const int column = threadIdx.x % 128;
  const float (*part)[kTile] = s.sums[group];
  if (tile_n * kTile + column < p.N)
    p.column_sums[int64_t{tile_m} * p.N + tile_n * kTile + column] =
        (part[0][column] + part[1][column]) + (part[2][column] + part[3][column]);
  named_barrier(1 + group, 128);  // the sums are read before the next tile writes its own
}

#endif

}  // namespace widedeep::kernels::sm90
