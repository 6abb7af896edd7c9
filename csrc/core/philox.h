// Philox4x32 counter-based random numbers and the dropout mask made from them.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Ten rounds are the paper's
// conservative choice; seven pass BigCrush (its table 2) and are what dropout uses.
#pragma once
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

struct Philox4 {
  uint32_t word[4];
};

// Both words of a product. On a GPU in so many words, since the compiler otherwise carries 64 bits through the rounds.
WD_HOST_DEVICE inline void multiply_wide(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#ifdef __CUDA_ARCH__
  asm("{\n.reg .b64 product;\nmul.wide.u32 product, %2, %3;\nmov.b64 {%0, %1}, product;\n}"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = uint64_t{a} * b;
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
#endif
}

template <int kRounds>
WD_HOST_DEVICE inline Philox4 philox4x32(Philox4 counter, uint32_t key_lo, uint32_t key_hi) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kRounds; ++round) {
    uint32_t low0, high0, low1, high1;
    multiply_wide(0xD2511F53u, c0, low0, high0);
    multiply_wide(0xCD9E8D57u, c2, low1, high1);
    c0 = high1 ^ c1 ^ key_lo;
    c1 = low1;
    c2 = high0 ^ c3 ^ key_hi;
    c3 = low0;
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The mask of one layer in one step. Element (row, column n) is dropped when its 16 random bits are < threshold. One
// call serves eight elements of a row: column n belongs to call (n >> 5) * 4 + ((n >> 1) & 3), slot ((n >> 3) & 3) * 2
// + (n & 1); even slots are the low half of word slot >> 1. A thread of a wgmma tile owns columns {2j, 2j+1} + 8s:
// whole calls.
struct Dropout {
  uint32_t key_lo, key_hi, step_lo, step_hi;
  uint32_t layer_bits;  // layer << 24
  uint32_t threshold;   // of 65536, even; 0 switches dropout off
  float scale;          // of kept values: 65536 / (65536 - threshold)
};

// 2 round(p * 32768), halves up: an even number, so that 15 bits decide and two comparisons fit a 32-bit addition.
// Caller guarantees 0 <= p and a result < 65536 (else nothing would be kept).
WD_HOST_DEVICE inline uint32_t dropout_threshold(double p) { return 2 * static_cast<uint32_t>(p * 32768.0 + 0.5); }

WD_HOST_DEVICE inline float dropout_scale(double p) {
  return static_cast<float>(65536.0 / (65536.0 - static_cast<double>(dropout_threshold(p))));
}

// layer < 256; step and seed are taken as 64 bits, whatever their sign.
WD_HOST_DEVICE inline Dropout make_dropout(double p, uint64_t seed, uint64_t step, uint32_t layer) {
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(step),
          static_cast<uint32_t>(step >> 32),
          layer << 24,
          dropout_threshold(p),
          dropout_scale(p)};
}

// The 4 x 2 x 16 bits of one call. row is the row's position within the global batch, taken modulo 2^32.
WD_HOST_DEVICE inline Philox4 dropout_bits(const Dropout& d, uint32_t row, uint32_t call) {
  return philox4x32<7>({{row, d.layer_bits | call, d.step_lo, d.step_hi}}, d.key_lo, d.key_hi);
}

WD_HOST_DEVICE inline bool dropout_keep(const Dropout& d, uint32_t row, uint32_t column) {
  const Philox4 bits = dropout_bits(d, row, (column >> 5) * 4 + ((column >> 1) & 3));
  return ((bits.word[(column >> 3) & 3] >> ((column & 1) * 16)) & 0xFFFFu) >= d.threshold;
}

// What call j of 32 columns keeps of them: bit i stands for column 32 * group + i; zeros for those of other calls.
WD_HOST_DEVICE inline uint32_t dropout_keep8(const Dropout& d, uint32_t row, uint32_t group, uint32_t j) {
  const Philox4 bits = dropout_bits(d, row, group * 4 + j);
  uint32_t keep = 0;
  for (uint32_t s = 0; s < 4; ++s) {
    keep |= static_cast<uint32_t>((bits.word[s] & 0xFFFFu) >= d.threshold) << (8 * s);
    keep |= static_cast<uint32_t>((bits.word[s] >> 16) >= d.threshold) << (8 * s + 1);
  }
  return keep << (2 * j);
}

// Bit i says whether column 32 * group + i of the row is kept: four calls for 32 columns.
WD_HOST_DEVICE inline uint32_t dropout_keep32(const Dropout& d, uint32_t row, uint32_t group) {
  uint32_t keep = 0;
  for (uint32_t j = 0; j < 4; ++j) keep |= dropout_keep8(d, row, group, j);
  return keep;
}

}  // namespace widedeep::core
