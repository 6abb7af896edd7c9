// From accumulators to rows: the warps that multiply hand a tile over through shared memory, rounded to the type of C,
// and multiply on; three other warps meanwhile finish its rows. A lane has 16 bytes of a row, so that masks, column
// sums and stores need no exchange between rows. Included by gemm_sm90.cu alone.
#pragma once
#include <type_traits>

#include "kernels/gemm_sm90_draw.cuh"
#include "kernels/gemm_sm90_ring.cuh"
#include "kernels/sm90_pairs.cuh"

namespace widedeep::kernels::sm90 {

// 144 KB of the ring and 64 KB of rows handed over, of 227 KB.
struct Shared {
  Ring ring;
  alignas(1024) uint8_t out[2][kGroupRows][kRowBytes];
  float offset[2][kColumns];  // of each warpgroup: the bias of its tile, times the scale of dropout
  alignas(16) float sums[kFinishers][kColumns];
  // Of each warpgroup's rows in `out`. Every thread arrives for itself: where one lane arrives for its warp, after
  // __syncwarp, racecheck takes what the others did for races (and bar.arrive for no order at all).
  uint64_t ready[2], taken[2];
};

constexpr int kFinishing = 32 * kFinishers;  // threads

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a 16-byte chunk of a row lies in `out`: no bank conflicts, neither for fragments nor for whole rows.
template <typename T>
__device__ __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk) {
  return (chunk ^ (kHalf<T> ? row & 7 : row << 1 & 6)) * 16;
}

// ---- the multiplying side ----

// What a thread adds to its columns of a warpgroup's tile, 8 j + 2 (lane % 4) and the next one, of kAhead j.
constexpr int kAhead = 16;
using Shift = Pack<float, 2>;

__device__ __forceinline__ Shift load_shift(const Shared& s, int group, int j) {
  return *reinterpret_cast<const Shift*>(&s.offset[group][j * 8 + threadIdx.x % 4 * 2]);
}

template <Epilogue kEpilogue>
__device__ __forceinline__ void load_shifts(const Shared& s, int group, int first, Shift (&shift)[kAhead]) {
  if constexpr (kEpilogue == Epilogue::kForward)
#pragma unroll
    for (int j = 0; j < kAhead; ++j) shift[j] = load_shift(s, group, first + j);
}

// Hands over columns turn * kHanded .. of a warp's 16 rows: acc times scale, in the forward pass shifted, and relu (NaN
// stays). `shift`: of the first columns; those of the others are loaded as room comes free.
template <typename T, Epilogue kEpilogue, int kTurn>
__device__ __forceinline__ void hand_over(Shared& s, const float (&acc)[128], float scale, int group,
                                          Shift (&shift)[kAhead]) {
  constexpr bool kForward = kEpilogue == Epilogue::kForward;
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
  const auto value = [&](int j, int i, int e) {
    const float v = acc[j * 4 + i * 2 + e];
    return kForward ? fmaf(v, scale, shift[j % kAhead].v[e]) : v * scale;
  };
  if constexpr (kHalf<T>) {
    const uint32_t row = warp * 16 + (lane / 8 & 1) * 8 + lane % 8;
    const uint32_t target = smem_address(s.out[group][row]), chunk = (lane / 16 ^ lane % 8) * 16;
#pragma unroll
    for (int t = 0; t < kColumns / 16; ++t) {
      uint32_t pairs[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = t * 2 + n / 2, i = n % 2;
        const float lower = value(j, i, 0), upper = value(j, i, 1);
        pairs[n] = kForward ? pack_relu<T>(lower, upper) : pack<T>(lower, upper);
      }
#pragma unroll
      for (int j = t * 2; j < t * 2 + 2; ++j)
        if (kForward && j + kAhead < kColumns / 8) shift[j % kAhead] = load_shift(s, group, j + kAhead);
      store_matrices(target + (t * 32 ^ chunk), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  } else {
    static_assert(kHanded<T> / 8 == kAhead);
    if constexpr (kTurn > 0) load_shifts<kEpilogue>(s, group, kTurn * kAhead, shift);
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int j = kTurn * kAhead + n;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t row = warp * 16 + lane / 4 + 8 * i;
        Pack<float, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float v = value(j, i, e);
          pair.v[e] = kForward && v <= 0.f ? 0.f : v;
        }
        uint8_t* const at = s.out[group][row] + chunk_at<T>(row, n * 2 + quad / 2) + quad % 2 * 8;
        *reinterpret_cast<Pack<float, 2>*>(at) = pair;
      }
    }
  }
}

// ---- the finishing side ----

// A finishing thread's part of a tile's offsets.
struct Offsets {
  static constexpr int kThreads = kFinishers * 32, kParts = (kColumns + kThreads - 1) / kThreads;
  float v[kParts];
};

template <typename T>
__device__ __forceinline__ Offsets load_offsets(const Link& link, int column, int thread) {
  const auto* const bias = static_cast<const T*>(link.bias);
  Offsets offsets;
#pragma unroll
  for (int i = 0; i < Offsets::kParts; ++i) {
    const int n = thread + i * Offsets::kThreads;
    offsets.v[i] = n < kColumns && column + n < link.N ? to_float(bias[column + n]) * link.scale : 0.f;
  }
  return offsets;
}

__device__ __forceinline__ void store_offsets(Shared& s, const Offsets& offsets, int group, int thread) {
#pragma unroll
  for (int i = 0; i < Offsets::kParts; ++i)
    if (const int n = thread + i * Offsets::kThreads; n < kColumns) s.offset[group][n] = offsets.v[i];
}

constexpr int kMostBlocks = (kBlocks + kFinishers - 1) / kFinishers;  // that a warp finishes of a warpgroup's

template <typename T>
__device__ __forceinline__ void next_bits(Bits<T> (&bits)[kMostBlocks]) {
#pragma unroll
  for (int i = 0; i + 1 < kMostBlocks; ++i) bits[i] = bits[i + 1];
}

// What dropout keeps of the blocks first, first + kFinishers ...; row and column: of the lane's first element of block
// 0.
template <typename T>
__device__ __forceinline__ void draw_blocks(const core::Dropout& drop, uint32_t row, uint32_t column, int first,
                                            Bits<T> (&bits)[kMostBlocks]) {
#pragma unroll 1
  for (int i = 0; i < kMostBlocks; ++i) {
    next_bits<T>(bits);
    const int block = first + i * kFinishers;
    if (block < kBlocks) bits[kMostBlocks - 1] = draw<T>(drop, row + block * kTogether, column);
  }
}

// The same of a mask, of which `mask` is the lane's word of block 0.
template <typename T>
__device__ __forceinline__ void load_blocks(const Bits<T>* mask, int first, Bits<T> (&bits)[kMostBlocks]) {
#pragma unroll
  for (int i = 0; i < kMostBlocks; ++i)
    if (first + i * kFinishers < kBlocks) bits[i] = mask[(first + i * kFinishers) * 32];
}

// Bits 15 and 31: whether the halves of a pair are infinite or NaN.
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C007C00u : 0x7F807F80u;
  return (pair & kExponent) + (0x80008000u - kExponent);
}

// All bits of what is kept of row n: of the lane's pair j (halves) or value j.
template <typename T>
__device__ __forceinline__ uint32_t kept(const Bits<T>& bits, int n, int j) {
  const uint32_t bytes = bits.v[kHalf<T> ? j / 2 : 0] << (7 - n);  // the row's bit to the top of each byte
  return spread_byte_signs(bytes, kHalf<T> ? 0x9988u + 0x2222u * (j % 2) : 0x8888u + 0x1111u * j);
}

// Zeroes what is dropped of row n, and notes which values are then positive; none is negative.
template <typename T, bool kDrop>
__device__ __forceinline__ void drop_row(uint32_t (&v)[4], const Bits<T>& keep, int n, Bits<T>& positive) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t mask = kDrop ? kept<T>(keep, n, j) : 0xFFFFFFFFu;
    v[j] &= kHalf<T> ? mask & 0x7FFF7FFFu : mask;  // halves: -0 becomes 0
    if constexpr (!kHalf<T>) positive.v[0] |= static_cast<uint32_t>(v[j] != 0) << (j * 8 + n);
  }
  if constexpr (kHalf<T>)
#pragma unroll
    for (int w = 0; w < 2; ++w) positive.v[w] += join_bytes(ones(v[2 * w]), ones(v[2 * w + 1])) << n;
}

// Zeroes the values of row n whose bit is 0, and says in `bad` whether halves are not finite.
template <typename T, bool kMasked>
__device__ __forceinline__ void mask_row(uint32_t (&v)[4], const Bits<T>& bits, int n, uint32_t& bad) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (kMasked) v[j] &= kept<T>(bits, n, j);
    if (kHalf<T> && !kMasked) bad |= not_finite<T>(v[j]);
  }
}

// Adds kTogether rows to the sums of the lane's columns. Halves are first added in fours, as halves: one instruction
// for two columns instead of four, for a rounding like those that the values have been through.
template <typename T>
__device__ __forceinline__ void add_rows(const uint32_t (&v)[kTogether][4], float (&sums)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (kHalf<T>) {
#pragma unroll
      for (int n = 0; n < kTogether; n += 4) {
        const uint32_t four = add_pairs<T>(add_pairs<T>(v[n][j], v[n + 1][j]), add_pairs<T>(v[n + 2][j], v[n + 3][j]));
        const auto pair = reinterpret_cast<const Pack<T, 2>&>(four);
        sums[j * 2] += to_float(pair.v[0]), sums[j * 2 + 1] += to_float(pair.v[1]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) sums[j] += __uint_as_float(v[n][j]);
    }
  }
}

// kTogether rows, from `row` and `column` of C on, of which `out` has what was handed over. What lies past the end of C
// is not stored. kFlag: there is dropout (forward; `given` is what it keeps), or a mask (gradient; `given`). Returns
// what is positive of them (forward).
template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ Bits<T> finish_rows(const uint8_t (*out)[kRowBytes], const Params& p, const Link& link,
                                               int row, int column, const Bits<T>& given, float (&sums)[8],
                                               uint32_t& bad) {
  const uint32_t lane = threadIdx.x % 32;
  const int at = column + static_cast<int>(lane) * kLane<T>, rows = at < link.N ? p.M - row : 0;
  uint32_t v[kTogether][4];
#pragma unroll
  for (int n = 0; n < kTogether; ++n) {  // `out` begins at a multiple of eight rows
    const uint4 loaded = *reinterpret_cast<const uint4*>(out[n] + chunk_at<T>(n, lane));
    v[n][0] = loaded.x, v[n][1] = loaded.y, v[n][2] = loaded.z, v[n][3] = loaded.w;
  }
  Bits<T> positive{};
  T* to = static_cast<T*>(link.c) + int64_t{row} * link.N + at;
#pragma unroll
  for (int n = 0; n < kTogether; ++n, to += link.N) {
    if constexpr (kEpilogue == Epilogue::kForward)
      drop_row<T, kFlag>(v[n], given, n, positive);
    else
      mask_row<T, kFlag>(v[n], given, n, bad);
    store_if(to, make_uint4(v[n][0], v[n][1], v[n][2], v[n][3]), n < rows);
  }
  // Without a mask there is nothing below whose bias would want the sums.
  if constexpr (kEpilogue == Epilogue::kGradient && kFlag) add_rows<T>(v, sums);
  return positive;
}

// Column sums of a tile: those of the warps in order, into a strip of the launch's sums.
template <typename T>
__device__ __forceinline__ void add_warps(Shared& s, const Link& link, const float (&sums)[kTurns<T>][8], int first,
                                          int strip, int column) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int turn = 0; turn < kTurns<T>; ++turn)
#pragma unroll
    for (int n = 0; n < kLane<T>; n += 4)  // 16 bytes a lane: no bank conflicts
      *reinterpret_cast<Pack<float, 4>*>(&s.sums[first][turn * kHanded<T> + lane * kLane<T> + n]) = {
          {sums[turn][n], sums[turn][n + 1], sums[turn][n + 2], sums[turn][n + 3]}};
  named_barrier(1, kFinishing);
  for (int n = first * 32 + static_cast<int>(lane); n < kColumns && column + n < link.N; n += kFinishing)
    link.column_sums[int64_t{strip} * link.N + column + n] = (s.sums[0][n] + s.sums[1][n]) + s.sums[2][n];
  named_barrier(1, kFinishing);  // the sums are read before the next tile writes its own
}

#endif

}  // namespace widedeep::kernels::sm90
