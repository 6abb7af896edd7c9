#include "order.h"

namespace emulator {

std::mt19937_64& generator() {
  static std::mt19937_64 numbers;
  return numbers;
}

uint64_t random_number() { return generator()(); }

Laggards::Laggards(uint64_t chance, const Thread& drawn)
    : which_{static_cast<decltype(which_)>(chance % 3)}, block_{drawn.block}, warp_{drawn.number / 32} {}

bool Laggards::have(const Thread& thread) const {
  return which_ != kNone && thread.block == block_ && (which_ == kBlock || thread.number / 32 == warp_);
}

}  // namespace emulator
