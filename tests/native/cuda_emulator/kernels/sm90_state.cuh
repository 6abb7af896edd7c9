// What the instructions of sm90.cuh work on: shared memory by its addresses, mbarriers, and products that were issued.
#pragma once
#include <array>
#include <bit>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace widedeep::kernels::sm90 {

namespace emulated {

using emulator::current;
using emulator::fail;

// ---- addresses: 32 bits, an offset into the window of a block ----

inline uint8_t* at(const emulator::Block& block, uint32_t address, size_t bytes) {
  uint8_t* const p = block.window + address;
  if (p < block.dynamic || p + bytes > block.dynamic + block.dynamic_bytes) fail("address outside of shared memory");
  return p;
}

// ---- mbarriers ----

struct Barrier {
  int64_t expected, pending, bytes;  // bytes: the tx-count, below zero where copies land before they are announced
  uint64_t phase;
  const emulator::Thread* unfenced;  // who initialised it, until that thread's fence.mbarrier_init
};

constexpr int64_t kMostCount = (1 << 20) - 1;  // of arrivals; and of bytes, above and below zero

inline std::map<std::pair<const void*, uint32_t>, Barrier>& barriers() {
  static std::map<std::pair<const void*, uint32_t>, Barrier> all;
  return all;
}

constexpr uint64_t kMark = 0xBA881E88BA881E88ull;  // what an initialised barrier holds: it must not be written over

inline Barrier& barrier_at(const emulator::Block& block, uint32_t address) {
  uint64_t held;
  __builtin_memcpy(&held, at(block, address, 8), 8);
  if (address % 8 != 0 || held != kMark) fail("use of an mbarrier that was not initialised or was written over");
  Barrier& b = barriers().at({&block, address});
  const bool outside = !current || current->block != &block;  // a copy, or another block's thread
  if (outside && b.unfenced) fail("use of an mbarrier from outside of its block without fence.mbarrier_init");
  return b;
}

inline void complete(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects");
  if (b.bytes < -kMostCount || b.bytes > kMostCount) fail("more bytes at an mbarrier than it can count");
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.expected;
  }
  emulator::change();
}

// ---- products ----

enum class Type { f16, bf16, tf32 };

struct Product {
  float* d;
  uint64_t a, b;
  bool accumulate;
  Type type;
};
struct Pending {
  std::vector<std::vector<Product>> groups;  // committed, oldest first
  std::vector<Product> open;
  bool fenced = false;                                 // since the accumulators were last used by anything but products
  const bool at_once = emulator::random_number() & 1;  // products are taken when they are issued, not when waited for
};
inline std::map<const emulator::Thread*, Pending>& pending() {
  static std::map<const emulator::Thread*, Pending> all;
  return all;
}

inline float value_of(uint16_t bits, Type type) {
  static const std::array<std::vector<float>, 2> table = [] {
    std::array<std::vector<float>, 2> t{std::vector<float>(65536), std::vector<float>(65536)};
    for (uint32_t i = 0; i < 65536; ++i) {
      t[0][i] = __half2float({static_cast<uint16_t>(i)});
      t[1][i] = __bfloat162float({static_cast<uint16_t>(i)});
    }
    return t;
  }();
  return table[type == Type::bf16][bits];
}

// The 16-byte chunk within rows of 128 bytes, bits 4 to 6 of the address, is exchanged by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The 32 bytes along K of one row of a K-major operand, 16 or 8 elements: rows of 128 bytes in groups of eight,
// the groups a stride apart; `swizzled` says where a chunk lies.
inline int read_row(uint64_t descriptor, int row, Type type, float (&out)[16]) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) fail("an operand with another swizzle is not emulated");
  if (descriptor >> 49 & 7) fail("an operand with a base offset is not emulated");
  const int elements = type == Type::tf32 ? 4 : 8;
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const uint32_t address = start + row / 8 * stride + row % 8 * 128 + chunk * 16;
    const uint8_t* const from = at(*current->block, swizzled(address), 16);
    for (int e = 0; e < elements; ++e) {
      float& value = out[chunk * elements + e];
      if (type == Type::tf32) {
        __builtin_memcpy(&value, from + e * 4, 4);
        if (std::bit_cast<uint32_t>(value) & 0x1FFF && value == value) fail("an operand that is not rounded to TF32");
      } else {
        uint16_t bits;
        __builtin_memcpy(&bits, from + e * 2, 2);
        value = value_of(bits, type);
      }
    }
  }
  return 2 * elements;
}

// This thread's share of d [64 x 256]: two rows of its warp's 16, two neighbouring columns of every eight.
inline void multiply(const Product& p) {
  const int warp = current->number / 32 % 4, lane = emulator::lane();
  float a[2][16], b[16];
  for (int i = 0; i < 2; ++i) read_row(p.a, warp * 16 + lane / 4 + 8 * i, p.type, a[i]);
  for (int j = 0; j < 32; ++j)
    for (int e = 0; e < 2; ++e) {
      const int depth = read_row(p.b, j * 8 + lane % 4 * 2 + e, p.type, b);
      for (int i = 0; i < 2; ++i) {
        float sum = 0.f;
        for (int k = 0; k < depth; ++k) sum += a[i][k] * b[k];
        float& d = p.d[j * 4 + i * 2 + e];
        d = p.accumulate ? d + sum : sum;
      }
    }
}

// To nearest, ties away from zero: what the copy engine does to a float on its way to a TF32 operand.
inline float rounded_to_tf32(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  return (bits & 0x7F800000u) == 0x7F800000u ? v : std::bit_cast<float>((bits + 0x1000u) & ~0x1FFFu);
}

// What a copy reads: the rows of the box one after the other, zeros where they lie outside of the matrix.
using Box = std::vector<uint8_t>;

inline Box read_box(const CUtensorMap& map, int32_t k, int32_t row) {
  const size_t size = map.element;
  Box box(size_t{map.box_rows} * map.box_columns * size);
  uint8_t* to = box.data();
  for (int64_t line = row; line < int64_t{row} + map.box_rows; ++line)
    for (int64_t column = k; column < int64_t{k} + map.box_columns; ++column, to += size) {
      if (column < 0 || line < 0 || column >= int64_t(map.columns) || line >= int64_t(map.rows)) continue;
      std::memcpy(to, map.base + line * map.pitch + column * size, size);
      if (size != 4) continue;
      float value;
      std::memcpy(&value, to, 4);
      value = rounded_to_tf32(value);
      std::memcpy(to, &value, 4);
    }
  return box;
}

}  // namespace emulated

}  // namespace widedeep::kernels::sm90
