// The arithmetic of matrix products whose operands lie in shared memory.
#pragma once
#include "emulator.h"

namespace emulator {

enum class Operand { f16, bf16, tf32 };

struct Product {
  float* d;
  uint64_t a, b;  // descriptors of K-major operands, 64 and 256 rows of 32 bytes
  bool accumulate;
  Operand type;
};

// The 16-byte chunk within rows of 128 bytes, bits 4 to 6 of the address, is exchanged by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The running thread's share of d [64, 256]: two rows of its warp's 16, two neighbouring columns of every eight.
void multiply(const Product& product);

}  // namespace emulator
