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

// Of several counters, round by round, so that a processor works on all of them at a time.
template <int kRounds, int kCount>
WD_HOST_DEVICE inline void philox4x32(Philox4 (&counters)[kCount], uint32_t key_lo, uint32_t key_hi) {
  for (int round = 0; round < kRounds; ++round) {
    for (Philox4& c : counters) {
      uint32_t low0, high0, low1, high1;
      multiply_wide(0xD2511F53u, c.word[0], low0, high0);
      multiply_wide(0xCD9E8D57u, c.word[2], low1, high1);
      c = {{high1 ^ c.word[1] ^ key_lo, low1, high0 ^ c.word[3] ^ key_hi, low0}};
    }
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
}

template <int kRounds>
WD_HOST_DEVICE inline Philox4 philox4x32(Philox4 counter, uint32_t key_lo, uint32_t key_hi) {
  Philox4 counters[1] = {counter};
  philox4x32<kRounds>(counters, key_lo, key_hi);
  return counters[0];
}

// The mask of one layer in one step. One call serves eight columns of two rows: (row, column n) has byte
// row % 2 * 8 + n % 8 of call (row / 2, n / 8), low bytes of low words first. Fifteen bits decide, so that a call need
// not give two bytes an element: the low seven of its byte, and below them the parity of the call, all sixteen bytes
// xor-ed. Whatever the byte, the parity is uniform and independent of any fourteen others. An element is dropped when
// 2 * (byte % 128 * 256 + parity) < threshold. For a call that is one comparison of its parity, then one of each byte
// with what follows from it.
struct Dropout {
  uint32_t key_lo, key_hi, step_lo, step_hi;
  uint32_t layer_bits;  // layer << 24
  uint32_t threshold;   // of 65536, even; 0 switches dropout off
  float scale;          // of kept values: 65536 / (65536 - threshold)
};

// 2 round(p * 32768), halves up: an even number, so that 15 bits decide and four comparisons fit a 32-bit addition.
// Caller guarantees 0 <= p and a result < 65536 (else nothing would be kept).
WD_HOST_DEVICE inline uint32_t dropout_threshold(double p) { return 2 * static_cast<uint32_t>(p * 32768.0 + 0.5); }

WD_HOST_DEVICE inline float dropout_scale(double p) {
  return static_cast<float>(65536.0 / (65536.0 - static_cast<double>(dropout_threshold(p))));
}

// layer < 256; step and seed are taken as 64 bits, whatever their sign.
WD_HOST_DEVICE inline Dropout make_dropout(uint32_t threshold, float scale, uint64_t seed, uint64_t step,
                                           uint32_t layer) {
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(step),
          static_cast<uint32_t>(step >> 32),
          layer << 24,
          threshold,
          scale};
}

WD_HOST_DEVICE inline Dropout make_dropout(double p, uint64_t seed, uint64_t step, uint32_t layer) {
  return make_dropout(dropout_threshold(p), dropout_scale(p), seed, step, layer);
}

// The bytes of one call: columns 8 * call ... of rows `row` and row ^ 1. row is the row's position within the global
// batch, taken modulo 2^32.
WD_HOST_DEVICE inline Philox4 dropout_counter(const Dropout& d, uint32_t row, uint32_t call) {
  return {{row >> 1, d.layer_bits | call, d.step_lo, d.step_hi}};
}

WD_HOST_DEVICE inline Philox4 dropout_bits(const Dropout& d, uint32_t row, uint32_t call) {
  return philox4x32<7>(dropout_counter(d, row, call), d.key_lo, d.key_hi);
}

// The same of rows row, row + 2, ...
template <int kCount>
WD_HOST_DEVICE inline void dropout_bits(const Dropout& d, uint32_t row, uint32_t call, Philox4 (&calls)[kCount]) {
  for (int i = 0; i < kCount; ++i) calls[i] = dropout_counter(d, row + 2 * i, call);
  philox4x32<7>(calls, d.key_lo, d.key_hi);
}

// 128 - the number below which a byte's low seven bits drop its column: added to them it sets bit 7 of those kept.
WD_HOST_DEVICE inline uint32_t dropout_addend(uint32_t threshold, const Philox4& bits) {
  uint32_t parity = bits.word[0] ^ bits.word[1] ^ bits.word[2] ^ bits.word[3];
  parity ^= parity >> 16;
  parity = (parity ^ parity >> 8) & 0xFF;
  return 128 - (threshold >> 9) - static_cast<uint32_t>(parity < (threshold >> 1 & 0xFF));
}

// Bit 7 of each byte of `word`, one of the call's: whether its column is kept. The other bits mean nothing.
WD_HOST_DEVICE inline uint32_t dropout_signs(uint32_t word, uint32_t addend) {
  return (word & 0x7F7F7F7Fu) + addend * 0x01010101u;
}

// One element, to be read: the loops and kernels take whole calls (dropout_keep8 and the like), which tests hold
// against this.
WD_HOST_DEVICE inline bool dropout_keep(const Dropout& d, uint32_t row, uint32_t column) {
  const Philox4 bits = dropout_bits(d, row, column >> 3);
  const uint32_t word = bits.word[row % 2 * 2 + (column >> 2 & 1)];
  return dropout_signs(word, dropout_addend(d.threshold, bits)) >> (column % 4 * 8 + 7) & 1;
}

// Bit i says whether column 8 * call + i of the row is kept.
WD_HOST_DEVICE inline uint32_t dropout_keep8(const Dropout& d, uint32_t row, uint32_t call) {
  const Philox4 bits = dropout_bits(d, row, call);
  const uint32_t addend = dropout_addend(d.threshold, bits);
  uint32_t keep = 0;
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t signs = dropout_signs(bits.word[row % 2 * 2 + half], addend) >> 7 & 0x01010101u;
    keep |= (signs * 0x10204080u >> 28) << (4 * half);  // the product gathers the four bits, the first lowest
  }
  return keep;
}

}  // namespace widedeep::core
