// The second kind of Hopper products: the warps that multiply hand their accumulators over through shared memory,
// rounded to the type of C, and multiply on; three other warps meanwhile finish the rows. A lane has 16 bytes of a row,
// so that masks, column sums and stores need no exchange between rows. Included by gemm_sm90_relay.cu alone.
#pragma once
#include "kernels/gemm_sm90_ring.cuh"

namespace widedeep::kernels::sm90::relay {

constexpr int kStages = 3;      // 3 x 48 KB beside 64 KB of rows handed over, of 227 KB
constexpr int kFinishers = 3;   // warps; the first of their warpgroup feeds the ring
constexpr int kTogether = 4;    // rows that a warp finishes together: their loads and random numbers overlap
constexpr int kRowBytes = 512;  // of a row handed over at a time

struct Shared {
  Ring<kStages> ring;
  alignas(1024) uint8_t out[2][kGroupRows][kRowBytes];
  float offset[2][kColumns];  // of each warpgroup: the bias of its tile, times the scale of dropout
  float sums[kFinishers][kColumns];
  uint64_t ready[2], taken[2];  // of `out`
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename T>
constexpr int kHanded = kRowBytes / static_cast<int>(sizeof(T));  // columns handed over at a time
template <typename T>
constexpr int kTurns = kColumns / kHanded<T>;

// Where a 16-byte chunk of a row lies in `out`: no bank conflicts, neither for fragments nor for whole rows.
template <typename T>
__device__ __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk) {
  return (chunk ^ (kHalf<T> ? row & 7 : row << 1 & 6)) * 16;
}

// ---- the multiplying side ----

// Hands over columns turn * kHanded .. of a warp's 16 rows: acc times scale, in the forward pass with its offset and
// relu (NaN stays).
template <typename T, Epilogue kEpilogue, int kTurn>
__device__ __forceinline__ void hand_over(Shared& s, const float (&acc)[128], float scale, uint32_t group) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
  const float* const offset = s.offset[group] + quad * 2;
  const auto value = [&](int j, int i, int e, const Pack<float, 2>& shift) {
    const float v = acc[j * 4 + i * 2 + e];
    return kEpilogue == Epilogue::kForward ? fmaf(v, scale, shift.v[e]) : v * scale;
  };
  const auto shift_of = [&](int j) {
    return kEpilogue == Epilogue::kForward ? *reinterpret_cast<const Pack<float, 2>*>(offset + j * 8)
                                           : Pack<float, 2>{};
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
        const Pack<float, 2> shift = shift_of(j);
        const float lower = value(j, i, 0, shift), upper = value(j, i, 1, shift);
        pairs[n] = kEpilogue == Epilogue::kForward ? pack_relu<T>(lower, upper) : pack<T>(lower, upper);
      }
      store_matrices(target + (t * 32 ^ chunk), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kHanded<T> / 8; ++n) {
      const int j = kTurn * (kHanded<T> / 8) + n;
      const Pack<float, 2> shift = shift_of(j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t row = warp * 16 + lane / 4 + 8 * i;
        Pack<float, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float v = value(j, i, e, shift);
          pair.v[e] = kEpilogue == Epilogue::kForward && v <= 0.f ? 0.f : v;
        }
        uint8_t* const at = s.out[group][row] + chunk_at<T>(row, n * 2 + quad / 2) + quad % 2 * 8;
        *reinterpret_cast<Pack<float, 2>*>(at) = pair;
      }
    }
  }
}

// ---- the finishing side ----

// The random words of a lane's pairs in a row: the four lanes of a quad make one Philox call each for their 32 columns
// and exchange the words, or, with half as many columns a lane, each makes the two calls that it needs.
template <typename T>
__device__ __forceinline__ void random_words(const core::Dropout& drop, uint32_t row, uint32_t column, uint32_t lane,
                                             uint32_t (&word)[4]) {
  if constexpr (kHalf<T>) {
    const core::Philox4 own = core::dropout_bits(drop, row, column / 8 + lane);
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t* const w = own.word;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    const uint32_t x[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
    const uint32_t c = __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2);
    const uint32_t d = __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
    word[0] = high ? c : x[0], word[1] = high ? d : x[1];
    word[2] = high ? x[2] : c, word[3] = high ? x[3] : d;
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const core::Philox4 call = core::dropout_bits(drop, row, (column / 32 + lane / 8) * 4 + lane % 2 * 2 + j);
      const uint32_t* const w = call.word;
      const uint32_t slot = lane / 2 % 4;
      word[j] = slot < 2 ? (slot == 0 ? w[0] : w[1]) : (slot == 2 ? w[2] : w[3]);
    }
  }
}

// Bits of the values of `v` that are positive, of which none is negative: pairs of halves, bit j and 4 + j for pair j;
// or floats, bit n. Zeroes what `word` drops.
template <typename T, bool kDrop>
__device__ __forceinline__ uint32_t drop_some(uint32_t (&v)[4], const uint32_t (&word)[4], uint32_t threshold) {
  uint32_t bits = 0;
  if constexpr (kHalf<T>) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] &= kDrop ? kept(word[j], threshold) & 0x7FFF7FFFu : 0x7FFF7FFFu;  // -0 becomes 0
      bits |= (v[j] + 0x7FFF7FFFu) >> (15 - j) & 0x00010001u << j;
    }
    return (bits | bits >> 12) & 0xFF;
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t keep = kDrop ? kept(word[n / 2], threshold) : 0xFFFFFFFFu;
      v[n] &= n % 2 == 0 ? keep << 16 | (keep & 0xFFFFu) : keep >> 16 | (keep & 0xFFFF0000u);
      bits |= static_cast<uint32_t>(v[n] != 0) << n;
    }
    return bits;
  }
}

// Zeroes the values whose bit is 0, adds the others up, and says in `bad` whether halves are not finite.
template <typename T, bool kMasked>
__device__ __forceinline__ void mask_some(uint32_t (&v)[4], uint32_t bits, float (&sums)[8], uint32_t& bad) {
  const uint32_t spread = bits | bits << 12;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (kHalf<T>) {
      if (kMasked) v[j] &= (spread >> j & 0x00010001u) * 0xFFFFu;
      if (!kMasked) bad |= not_finite<T>(v[j]);
      const auto pair = reinterpret_cast<const Pack<T, 2>&>(v[j]);
      sums[j * 2] += to_float(pair.v[0]), sums[j * 2 + 1] += to_float(pair.v[1]);
    } else {
      if (kMasked && !(bits >> j & 1)) v[j] = 0;
      sums[j] += __uint_as_float(v[j]);
    }
  }
}

// Bytes of the mask for a row that is handed over: lane l of a half type has byte l, of floats half of byte l / 2.
template <typename T>
constexpr int kRowMask = kHanded<T> / 8;

template <typename T>
__device__ __forceinline__ void store_mask(uint8_t* mask, uint32_t bits, uint32_t lane) {
  if constexpr (!kHalf<T>) {
    bits |= __shfl_down_sync(0xffffffffu, bits, 1) << 4;
    if (lane % 2 == 0) mask[lane / 2] = static_cast<uint8_t>(bits);
  } else {
    mask[lane] = static_cast<uint8_t>(bits);
  }
}

template <typename T>
__device__ __forceinline__ uint32_t load_mask(const uint8_t* mask, uint32_t lane) {
  return kHalf<T> ? mask[lane] : mask[lane / 2] >> lane % 2 * 4;
}

// Rows `first`, first + 3, ... of the 64 that a warpgroup has handed over, kTogether of them; `row` and `column`: where
// these 64 begin in C. What lies past its end is not stored.
template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void finish_rows(const uint8_t (*out)[kRowBytes], const Params& p, const core::Dropout& drop,
                                            int first, int row, int column, uint8_t* mask, float (&sums)[8],
                                            uint32_t& bad) {
  const uint32_t lane = threadIdx.x % 32;
  constexpr int kLane = 16 / static_cast<int>(sizeof(T));  // columns of a lane
  const int at = column + static_cast<int>(lane) * kLane;
  uint32_t v[kTogether][4], bits[kTogether];
#pragma unroll
  for (int n = 0; n < kTogether; ++n) {
    const int r = first + n * kFinishers;
    uint4 loaded{};
    if (r < kGroupRows) loaded = *reinterpret_cast<const uint4*>(out[r] + chunk_at<T>(r, lane));
    v[n][0] = loaded.x, v[n][1] = loaded.y, v[n][2] = loaded.z, v[n][3] = loaded.w;
    bits[n] = 0;
    if (kEpilogue == Epilogue::kGradient && kFlag && r < kGroupRows)
      bits[n] = load_mask<T>(mask + r * kRowMask<T>, lane);
  }
#pragma unroll
  for (int n = 0; n < kTogether; ++n) {
    if constexpr (kEpilogue == Epilogue::kForward) {
      uint32_t word[4] = {};
      const auto number = p.dropout.first_row + static_cast<uint32_t>(row + first + n * kFinishers);
      if (kFlag) random_words<T>(drop, number, column, lane, word);
      bits[n] = drop_some<T, kFlag>(v[n], word, drop.threshold);
    } else {
      mask_some<T, kFlag>(v[n], bits[n], sums, bad);
    }
  }
#pragma unroll
  for (int n = 0; n < kTogether; ++n) {
    const int r = first + n * kFinishers;
    if (r >= kGroupRows) break;
    if (kEpilogue == Epilogue::kForward && mask) store_mask<T>(mask + r * kRowMask<T>, bits[n], lane);
    store_if(static_cast<T*>(p.c) + int64_t{row + r} * p.N + at, make_uint4(v[n][0], v[n][1], v[n][2], v[n][3]),
             at < p.N && row + r < p.M);
  }
}

// Column sums of a tile: those of the warps in order, into a strip of the launch's sums.
template <typename T>
__device__ __forceinline__ void add_warps(Shared& s, const Params& p, const float (&sums)[kTurns<T>][8], int first,
                                          int tile_m, int column) {
  const uint32_t lane = threadIdx.x % 32;
  constexpr int kLane = 16 / static_cast<int>(sizeof(T)), kAll = kFinishers * 32;
#pragma unroll
  for (int turn = 0; turn < kTurns<T>; ++turn)
#pragma unroll
    for (int n = 0; n < kLane; ++n) s.sums[first][turn * kHanded<T> + lane * kLane + n] = sums[turn][n];
  named_barrier(3, kAll);
  for (int n = first * 32 + static_cast<int>(lane); n < kColumns && column + n < p.N; n += kAll)
    p.column_sums[int64_t{tile_m} * p.N + column + n] = (s.sums[0][n] + s.sums[1][n]) + s.sums[2][n];
  named_barrier(3, kAll);  // the sums are read before the next tile writes its own
}

#endif

}  // namespace widedeep::kernels::sm90::relay
