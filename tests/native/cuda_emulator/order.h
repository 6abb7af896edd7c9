// What is left to chance: by these numbers the order of threads and blocks is drawn. Not for kernels.
#pragma once
#include <random>

#include "emulator.h"

namespace emulator {

std::mt19937_64& generator();

// By `chance`, in two launches of three the block of `drawn` lags behind, or its warp: what it has yet to set up, or
// still reads, the others must wait for.
struct Laggards {
  Laggards(uint64_t chance, const Thread& drawn);
  bool have(const Thread& thread) const;

 private:
  enum { kNone, kBlock, kWarp } which_;
  const Block* block_;
  int warp_;
};

}  // namespace emulator
