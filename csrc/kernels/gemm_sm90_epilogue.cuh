// What follows the product in the Hopper layers: each thread finishes its 128 accumulators, 128 bytes of each row at a
// time, through a small piece of shared memory from which whole lines go out. Included by gemm_sm90.cu alone.
#pragma once
#include "kernels/gemm_sm90_ring.cuh"

namespace widedeep::kernels::sm90 {

constexpr int kStages = 4;  // 4 x 48 KB beside 24 KB for the epilogues, of 227 KB
constexpr int kConsumers = 256;

struct Shared {
  Ring<kStages> ring;
  alignas(128) uint8_t staged[2][4][16][128];  // [warpgroup][warp][row]: what goes out of 16 rows at a time
  float sums[2][4][kColumns];
  uint64_t apart;  // the first warpgroup is ahead
  uint64_t step;   // of the dropout
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T>
constexpr int kPassColumns = kDepthBytes / static_cast<int>(sizeof(T));

// The two neighbours of a row that are finished together: columns 8 j + 2 quad, + 1 of the tile.
template <typename T>
struct Pair {
  float v[2];
};

// Where a 16-byte chunk of a staged row lies: no bank conflicts, neither for pairs nor for whole rows.
template <typename T>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return (chunk ^ (kHalf<T> ? row & 7 : row << 1 & 6)) * 16;
}

// Stages the pair of columns 8 n + 2 quad, + 1 of the pass.
template <typename T>
__device__ __forceinline__ void stage(uint8_t (*staged)[128], int row, int n, uint32_t quad, uint32_t lower,
                                      uint32_t upper) {
  if constexpr (kHalf<T>)
    *reinterpret_cast<uint32_t*>(staged[row] + chunk_at<T>(row, n) + quad * 4) = lower;
  else
    *reinterpret_cast<Pack<uint32_t, 2>*>(staged[row] + chunk_at<T>(row, n * 2 + quad / 2) +
                                          quad % 2 * 8) = {{lower, upper}};
}

// The 16 rows that a warp has staged go out in lines of 128 bytes.
template <typename T>
__device__ __forceinline__ void store_rows(const uint8_t (*staged)[128], const Params& p, int row, int column) {
  const int lane = threadIdx.x % 32, at = column + lane % 8 * (16 / static_cast<int>(sizeof(T)));
  const int rows = at < p.N ? p.M - row : 0;
  T* to = static_cast<T*>(p.c) + int64_t{row + lane / 8} * p.N + at;
  __syncwarp();
#pragma unroll
  for (int pass = 0; pass < 4; ++pass, to += int64_t{4} * p.N) {
    const int local = pass * 4 + lane / 8;
    const uint4 values = *reinterpret_cast<const uint4*>(staged[local] + chunk_at<T>(local, lane % 8));
    store_if(to, values, local < rows);
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from, bool valid) {
  if constexpr (kHalf<T>) {
    const uint32_t word = load_or_zero(from, valid);
    const auto pair = reinterpret_cast<const Pack<T, 2>&>(word);
    return {{to_float(pair.v[0]), to_float(pair.v[1])}};
  } else {
    return {{__uint_as_float(load_or_zero(from, valid)), __uint_as_float(load_or_zero(from + 1, valid))}};
  }
}

// relu of a pair, and zero where `keep` has no bits; a bit for each that is then positive joins `bits` at j and 16 + j.
template <typename T>
__device__ __forceinline__ void finish_pair(uint8_t (*staged)[128], int row, int n, uint32_t quad, float (&y)[2],
                                            uint32_t keep, int j, uint32_t& bits) {
  if constexpr (kHalf<T>) {
    const uint32_t stored = pack_relu<T>(y[0], y[1]) & keep & 0x7FFF7FFFu;  // -0 becomes 0
    bits |= (stored + 0x7FFF7FFFu) >> (15 - j) & 0x00010001u << j;
    stage<T>(staged, row, n, quad, stored, 0);
  } else {
    const uint32_t lower = y[0] <= 0.f ? 0 : __float_as_uint(y[0]) & (keep << 16 | (keep & 0xFFFFu));
    const uint32_t upper = y[1] <= 0.f ? 0 : __float_as_uint(y[1]) & (keep >> 16 | (keep & 0xFFFF0000u));
    bits |= static_cast<uint32_t>(lower != 0) << j | static_cast<uint32_t>(upper != 0) << (16 + j);
    stage<T>(staged, row, n, quad, lower, upper);
  }
}

template <typename T, bool kDrop>
__device__ __forceinline__ void finish_forward(Shared& s, float (&acc)[128], const Params& p, int tile_m, int tile_n) {
  // Built anew for each tile: kept across the product it would cost registers that the accumulators need.
  const core::Dropout drop = dropout_of(p.dropout, kDrop ? s.step : 0);
  const float scale = kDrop ? drop.scale : 1.f;
  uint32_t consumer = threadIdx.x - 128;
  asm volatile("" : "+r"(consumer));  // what follows from it is found anew as well
  const uint32_t group = consumer / 128, warp = consumer / 32 % 4, lane = consumer % 32;
  const uint32_t quad = lane % 4, row_in_warp = lane / 4;
  const int row = tile_m * kRows + group * kGroupRows + warp * 16, column = tile_n * kColumns;
  const uint32_t counter = p.dropout.first_row + static_cast<uint32_t>(row) + row_in_warp;
  const T* const bias = static_cast<const T*>(p.bias) + column + quad * 2;
  uint8_t (*const staged)[128] = s.staged[group][warp];
  uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll
  for (int block = 0; block < kColumns / 32; ++block) {  // one Philox call serves a thread's columns of it in a row
    if (column + block * 32 >= p.N) break;
    Pair<T> offset[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int at = block * 32 + slot * 8;
      offset[slot] = load_pair(bias + at, column + at < p.N);
      offset[slot].v[0] *= scale, offset[slot].v[1] *= scale;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      core::Philox4 random{};
      if (kDrop) random = core::dropout_bits(drop, counter + 8 * i, (column / 32 + block) * 4 + quad);
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const int j = block * 4 + slot, n = j % (kPassColumns<T> / 8);
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) y[e] = fmaf(acc[j * 4 + i * 2 + e], scale, offset[slot].v[e]);
        const uint32_t keep = kDrop ? kept(random.word[slot], drop.threshold) : 0xFFFFFFFFu;
        finish_pair<T>(staged, row_in_warp + 8 * i, n, quad, y, keep, j % 16, bits[i * 2 + j / 16]);
      }
    }
    constexpr int kBlocks = kPassColumns<T> / 32;
    if (block % kBlocks == kBlocks - 1 || column + (block + 1) * 32 >= p.N)
      store_rows<T>(staged, p, row, column + block / kBlocks * kPassColumns<T>);
  }
  if (p.mask)
    static_cast<uint4*>(p.mask)[(int64_t{tile_m} * p.tiles_n + tile_n) * kConsumers + consumer] =
        make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// kValues values a thread, summed over the eight lanes that hold other rows of the same columns. Each exchange halves
// what a lane keeps; afterwards slot i of a lane is value first_sum(lane) + i, of kValues / 8.
template <int kValues, int kLane = 16>
__device__ __forceinline__ void sum_over_rows(float* v) {
  constexpr int kKept = kValues / 2;
  const bool upper = threadIdx.x & kLane;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const float kept = upper ? v[i + kKept] : v[i], sent = upper ? v[i] : v[i + kKept];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kLane);
  }
  if constexpr (kLane > 4) sum_over_rows<kKept, kLane / 2>(v);
}

template <int kValues>
__device__ __forceinline__ uint32_t first_sum(uint32_t lane) {
  return ((lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1)) * (kValues / 8);
}

// One pass of the gradient: kPassColumns columns of a warp's 16 rows, masked, scaled, summed over the rows and staged.
template <typename T, bool kMasked, int kPass>
__device__ __forceinline__ void finish_pass(Shared& s, float (&acc)[128], const Params& p, const uint32_t (&bits)[4],
                                            uint32_t& bad, uint32_t group, uint32_t warp, uint32_t lane) {
  constexpr int kPairs = kPassColumns<T> / 8;
  const uint32_t quad = lane % 4, row_in_warp = lane / 4;
  float sums[kPairs * 2];
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    const int j = kPass * kPairs + n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[e] = acc[j * 4 + i * 2 + e] * p.scale;
        if (kMasked && !(bits[i * 2 + j / 16] & 1u << (e * 16 + j % 16))) v[e] = 0.f;
        sums[n * 2 + e] = i == 0 ? v[e] : sums[n * 2 + e] + v[e];
      }
      uint32_t lower = __float_as_uint(v[0]);
      if constexpr (kHalf<T>) {
        lower = pack<T>(v[0], v[1]);
        if (!kMasked) bad |= not_finite<T>(lower);
      }
      stage<T>(s.staged[group][warp], row_in_warp + 8 * i, n, quad, lower, __float_as_uint(v[1]));
    }
  }
  if (!p.column_sums) return;
  sum_over_rows<kPairs * 2>(sums);
  const uint32_t first = first_sum<kPairs * 2>(lane);
#pragma unroll
  for (int i = 0; i < kPairs / 4; ++i)
    s.sums[group][warp][kPass * kPassColumns<T> + (first + i) / 2 * 8 + quad * 2 + (first + i) % 2] = sums[i];
}

template <typename T, bool kMasked, int kPass = 0>
__device__ __forceinline__ void finish_passes(Shared& s, float (&acc)[128], const Params& p, const uint32_t (&bits)[4],
                                              uint32_t& bad, int row, int column, uint32_t group, uint32_t warp,
                                              uint32_t lane) {
  if (column + kPass * kPassColumns<T> >= p.N) return;
  finish_pass<T, kMasked, kPass>(s, acc, p, bits, bad, group, warp, lane);
  store_rows<T>(s.staged[group][warp], p, row, column + kPass * kPassColumns<T>);
  if constexpr ((kPass + 1) * kPassColumns<T> < kColumns)
    finish_passes<T, kMasked, kPass + 1>(s, acc, p, bits, bad, row, column, group, warp, lane);
}

template <typename T, bool kMasked>
__device__ __forceinline__ void finish_gradient(Shared& s, float (&acc)[128], const Params& p, uint4 mask, int tile_m,
                                                int tile_n) {
  uint32_t consumer = threadIdx.x - 128;
  asm volatile("" : "+r"(consumer));
  const uint32_t group = consumer / 128, warp = consumer / 32 % 4, lane = consumer % 32;
  const int row = tile_m * kRows + group * kGroupRows + warp * 16, column = tile_n * kColumns;
  const uint32_t bits[4] = {mask.x, mask.y, mask.z, mask.w};
  uint32_t bad = 0;
  finish_passes<T, kMasked>(s, acc, p, bits, bad, row, column, group, warp, lane);
  if (kHalf<T> && !kMasked && p.found_inf && (bad & 0x80008000u)) *p.found_inf = 1.f;  // all write the same
  if (!p.column_sums) return;
  named_barrier(1 + group, 128);
  const float (*const part)[kColumns] = s.sums[group];
  float* const to = p.column_sums + (int64_t{tile_m} * 2 + group) * p.N + column;
  for (int n = static_cast<int>(consumer % 128); n < kColumns && column + n < p.N; n += 128)
    to[n] = (part[0][n] + part[1][n]) + (part[2][n] + part[3][n]);
  named_barrier(1 + group, 128);  // the sums are read before the next tile writes its own
}

#endif

}  // namespace widedeep::kernels::sm90
