// The order of an epoch as a function of position: position -> row, with nothing stored. Twin: widedeep/shuffle.py
// (numpy).
//
// clang-format off
// Unsigned 64-bit arithmetic throughout, modulo 2^64; mix64 and absorb are those of core/hash.h;
// G = 0x9E3779B97F4A7C15.
//
// 1. feistel(i, n, key), a permutation of [0, n). For n <= 1 it is 0. Otherwise
//    b = number of bits of n - 1, at least 2;  low = b / 2 bits (rounded down);  high = b - low bits.
//    Split i into L (its high bits) and R (its low bits). Eight rounds r = 0..7, with the round function
//        F_r(x) = mix64(x + key + r * G) >> 32:
//        r even:  L = (L xor F_r(R)) mod 2^high
//        r odd:   R = (R xor F_r(L)) mod 2^low
//    The result is L * 2^low + R; while it is >= n, the eight rounds are applied to it again (cycle walking; 2^b < 2n
//    for n > 2, so fewer than two applications on average). The inverse runs the rounds 7..0.
// 2. Keys: e = absorb(absorb(0, seed), epoch);  block key = absorb(e, 1);  key of window w = absorb(absorb(e, 2), w).
// 3. Blocks: block k is rows [k * block_rows, min((k + 1) * block_rows, rows)), so only the last one may be short, of
//    blocks = ceil(rows / block_rows). The q-th block of the epoch is feistel(q, blocks, block key).
// 4. Windows: window w is the blocks q in [w * c, min((w + 1) * c, blocks)) of that order, laid end to end;
//    c = ceil(window_rows / block_rows). Windows follow each other. The j-th row of window w, which has s rows, is row
//    feistel(j, s, key of w) of its blocks laid end to end. A data set of at most window_rows rows is one window: it is
//    permuted as a whole.
// clang-format on
#pragma once
#include <cstdint>

#include "core/hash.h"
#include "core/macros.h"

namespace widedeep::core {

class Feistel {
 public:
  WD_HOST_DEVICE Feistel(uint64_t n, uint64_t key) : n_(n), key_(key) {
    uint32_t bits = 2;
    while (bits < 64 && ((n - 1) >> bits) != 0) ++bits;
    low_ = n > 1 ? bits / 2 : 1;
    low_mask_ = (uint64_t{1} << low_) - 1;
    high_mask_ = (uint64_t{1} << (bits - bits / 2)) - 1;
  }

  WD_HOST_DEVICE uint64_t operator()(uint64_t i) const {
    if (n_ <= 1) return 0;
    do {
      uint64_t L = i >> low_, R = i & low_mask_;
      for (uint64_t r = 0; r < kRounds; r += 2) {
        L = (L ^ round(R, r)) & high_mask_;
        R = (R ^ round(L, r + 1)) & low_mask_;
      }
      i = (L << low_) | R;
    } while (i >= n_);
    return i;
  }

  WD_HOST_DEVICE uint64_t inverse(uint64_t i) const {
    if (n_ <= 1) return 0;
    do {
      uint64_t L = i >> low_, R = i & low_mask_;
      for (uint64_t r = kRounds; r > 0; r -= 2) {
        R = (R ^ round(L, r - 1)) & low_mask_;
        L = (L ^ round(R, r - 2)) & high_mask_;
      }
      i = (L << low_) | R;
    } while (i >= n_);
    return i;
  }

 private:
  static constexpr uint64_t kRounds = 8;

  WD_HOST_DEVICE uint64_t round(uint64_t x, uint64_t r) const {
    return mix64(x + key_ + r * 0x9E3779B97F4A7C15ull) >> 32;
  }

  uint64_t n_, key_, low_mask_, high_mask_;
  uint32_t low_;
};

constexpr int64_t kMostOrdered = int64_t{1} << 40;  // rows of an order: sums and products of them stay far from 2^64

// Caller guarantees that rows, block_rows and window_rows are from 1 to kMostOrdered, and position < rows.
class EpochOrder {
 public:
  WD_HOST_DEVICE EpochOrder(uint64_t rows, uint64_t block_rows, uint64_t window_rows, uint64_t seed, uint64_t epoch)
      : rows_(rows),
        block_rows_(block_rows),
        window_blocks_((window_rows + block_rows - 1) / block_rows),
        blocks_((rows + block_rows - 1) / block_rows),
        missing_(blocks_ * block_rows - rows),
        epoch_key_(absorb(absorb(0, seed), epoch)),
        block_order_(blocks_, absorb(epoch_key_, 1)),
        short_place_(block_order_.inverse(blocks_ - 1)) {}

  // The rows of a window, in their own order: at positions [first, first + size).
  struct Window {
    uint64_t first, size;
    Feistel within;
  };

  // Past the short block the layout is as if all blocks were full, moved up by the rows that the short one lacks.
  WD_HOST_DEVICE Window window_of(uint64_t position) const {
    const uint64_t window_full = window_blocks_ * block_rows_;
    const uint64_t short_window = short_place_ / window_blocks_;
    uint64_t window = position / window_full;
    if (window > short_window || position >= start(short_window + 1)) window = (position + missing_) / window_full;
    const uint64_t first = start(window), size = start(window + 1) - first;
    return {first, size, Feistel(size, absorb(absorb(epoch_key_, 2), window))};
  }

  // Where the row of a window's position lies among the blocks laid end to end, all of block_rows rows.
  WD_HOST_DEVICE uint64_t place_of(const Window& window, uint64_t position) const {
    const uint64_t place = window.first + window.within(position - window.first);
    return place >= (short_place_ + 1) * block_rows_ - missing_ ? place + missing_ : place;
  }

  // The first row of the q-th block of the epoch.
  WD_HOST_DEVICE uint64_t block_start(uint64_t q) const { return block_order_(q) * block_rows_; }

  WD_HOST_DEVICE uint64_t block_rows() const { return block_rows_; }

  WD_HOST_DEVICE uint64_t operator()(uint64_t position) const {
    const uint64_t place = place_of(window_of(position), position);
    return block_start(place / block_rows_) + place % block_rows_;
  }

 private:
  // First position of a window; the number of rows for the window past the last.
  WD_HOST_DEVICE uint64_t start(uint64_t window) const {
    const uint64_t full = window * window_blocks_ * block_rows_;
    const uint64_t at = window > short_place_ / window_blocks_ ? full - missing_ : full;
    return at < rows_ ? at : rows_;
  }

  uint64_t rows_, block_rows_, window_blocks_, blocks_, missing_, epoch_key_;
  Feistel block_order_;
  uint64_t short_place_;
};

}  // namespace widedeep::core
