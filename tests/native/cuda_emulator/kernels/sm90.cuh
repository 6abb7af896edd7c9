// The functions of csrc/kernels/sm90.cuh as the PTX manual describes the instructions, written from the manual and not
// from that file (but for `operand`, plain arithmetic, which comes from there and is read back here bit by bit). What
// happens by itself happens late: a copy lands at some random time after it was issued and its target holds NaNs until
// then; a product is taken when it is waited for, or at once, as a coin of the launch says.
#pragma once
#include <array>
#include <bit>
#include <map>
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
};

inline std::map<std::pair<const void*, uint32_t>, Barrier>& barriers() {
  static std::map<std::pair<const void*, uint32_t>, Barrier> all;
  return all;
}

constexpr uint64_t kMark = 0xBA881E88BA881E88ull;  // what an initialised barrier holds: it must not be written over

inline Barrier& barrier_at(const emulator::Block& block, uint32_t address) {
  uint64_t held;
  __builtin_memcpy(&held, at(block, address, 8), 8);
  if (address % 8 != 0 || held != kMark) fail("use of an mbarrier that was not initialised or was written over");
  return barriers().at({&block, address});
}

inline void complete(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects");
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

// The 16-byte chunk within rows of 128 (64) bytes, bits 4 to 6 (5) of the address, is exchanged by bits 7 to 9 (8).
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

// The 32 bytes along K of one row of a K-major operand, 16 or 8 elements: rows of 128 or 64 bytes in groups of eight,
// the groups a stride apart; `swizzled` says where a chunk lies.
inline int read_row(uint64_t descriptor, int row, Type type, float (&out)[16]) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t row_bytes = descriptor >> 62 == 1 ? 128 : 64;
  if (descriptor >> 62 != 1 && descriptor >> 62 != 2) fail("an operand with another swizzle is not emulated");
  if (descriptor >> 49 & 7) fail("an operand with a base offset is not emulated");
  const int elements = type == Type::tf32 ? 4 : 8;
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const uint32_t address = start + row / 8 * stride + row % 8 * row_bytes + chunk * 16;
    const uint8_t* const from = at(*current->block, swizzled(address, row_bytes), 16);
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

}  // namespace emulated

inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulator::current->block->window);
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  using namespace emulated;
  __builtin_memcpy(at(*current->block, barrier, 8), &kMark, 8);
  barriers()[{current->block, barrier}] = {arrivals, arrivals, 0, 0};
  std::erase_if(pending(), [](const auto& of) { return of.first->block == current->block; });
}

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emulated::Barrier& b = emulated::barrier_at(*emulator::current->block, barrier);
  b.bytes += bytes;
  --b.pending;
  emulated::complete(b);
}

inline void barrier_arrive(uint32_t barrier) {
  emulated::Barrier& b = emulated::barrier_at(*emulator::current->block, barrier);
  --b.pending;
  emulated::complete(b);
}

inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  const auto& blocks = emulator::current->block->cluster->blocks;
  if (rank >= blocks.size()) emulator::fail("arrival at a block outside of the cluster");
  if (blocks[rank]->live == 0) emulator::fail("arrival at a block that has ended");
  emulated::Barrier& b = emulated::barrier_at(*blocks[rank], barrier);
  --b.pending;
  emulated::complete(b);
}

// Until the phase of this parity is complete; the phase before the first counts as complete, with parity 1.
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const emulator::Block& block = *emulator::current->block;
  emulator::wait_until([&] { return (emulated::barrier_at(block, barrier).phase & 1) != parity; }, "mbarrier wait");
}

inline void fence_barrier_init() {}
inline void prefetch_map(const CUtensorMap*) {}
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulator::current->block->rank); }
inline void cluster_sync() {
  emulator::meet_warp("cluster_sync");  // aligned: a warp comes as a whole
  emulator::meet(emulator::current->block->cluster->all, "cluster_sync");
}

inline void tma_load_multicast(uint32_t target, const CUtensorMap* map, int32_t k, int32_t row, uint32_t barrier,
                               uint16_t blocks) {
  using namespace emulated;
  const uint32_t row_bytes = map->box_columns * map->element;
  const size_t bytes = size_t{map->box_rows} * row_bytes;
  if (target % 128 != 0) fail("the target of a copy must be aligned to 128 bytes");
  const auto& all = current->block->cluster->blocks;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    emulator::Block* const block = all[rank];
    std::memset(at(*block, target, bytes), 0xFF, bytes);
    emulator::later([=, map = *map] {
      if (block->live == 0) fail("a copy lands in a block that has ended");
      for (uint32_t r = 0; r < map.box_rows; ++r)
        for (uint32_t chunk = 0; chunk < row_bytes / 16; ++chunk) {
          const uint32_t address = swizzled(target + r * row_bytes + chunk * 16, row_bytes);
          uint8_t values[16] = {};
          const int size = static_cast<int>(map.element);
          for (int e = 0; e < 16 / size; ++e) {
            const int64_t column = int64_t{k} + chunk * (16 / size) + e, line = int64_t{row} + r;
            if (column < 0 || line < 0 || column >= int64_t(map.columns) || line >= int64_t(map.rows)) continue;
            __builtin_memcpy(values + e * size, map.base + line * map.pitch + column * size, size);
            if (size == 4) {
              float value;
              __builtin_memcpy(&value, values + e * 4, 4);
              value = rounded_to_tf32(value);
              __builtin_memcpy(values + e * 4, &value, 4);
            }
          }
          __builtin_memcpy(at(*block, address, 16), values, 16);
        }
      Barrier& b = barrier_at(*block, barrier);
      b.bytes -= static_cast<int64_t>(bytes);
      complete(b);
    });
  }
}

inline void pause(uint32_t) {}

inline void counter_arrive(int32_t* counter) {
  ++*counter;
  emulator::change();
}
inline void counter_wait(const int32_t* counter, int32_t wanted) {
  emulator::wait_until([=] { return *counter >= wanted; }, "wait for a counter");
}

constexpr uint64_t kKeepNormally = 1, kEvictFirst = 2;

inline void tma_load(uint32_t target, const CUtensorMap* map, int32_t k, int32_t row, uint32_t barrier,
                     uint64_t policy) {
  if (policy != kKeepNormally && policy != kEvictFirst) emulator::fail("a copy with an unknown cache policy");
  tma_load_multicast(target, map, k, row, barrier, static_cast<uint16_t>(1 << cluster_rank()));
}

template <int kRegisters>
void register_grow() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::meet_warp("setmaxnreg");
}
template <int kRegisters>
void register_shrink() {
  register_grow<kRegisters>();
}

inline void named_barrier(int id, int threads) {
  emulator::meet_warp("named barrier");
  emulator::Meeting& m = emulator::current->block->named[id];
  m.expected = threads;
  emulator::meet(m, "named barrier");
}

constexpr uint64_t kStep = 32 >> 4;
#include "operand.inc"  // descriptors are made by the function of csrc/kernels/sm90.cuh itself

inline void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const int lane = emulator::lane();
  const uint32_t pairs[4] = {a, b, c, d};
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t address = __shfl_sync(0xffffffffu, row, matrix * 8 + lane / 4);
    if (address % 16 != 0) emulator::fail("a row of a matrix must be aligned to 16 bytes");
    __builtin_memcpy(emulated::at(*emulator::current->block, address + lane % 4 * 4, 4), &pairs[matrix], 4);
  }
}

inline void store_if(void* to, uint4 v, bool wanted) {
  if (wanted) *static_cast<uint4*>(to) = v;
}

template <typename T>
uint32_t pack(float lower, float upper) {
  const auto half = [](float v) {
    return std::is_same_v<T, __half> ? uint32_t{__float2half_rn(v).bits} : uint32_t{__float2bfloat16_rn(v).bits};
  };
  return half(lower) | half(upper) << 16;
}

template <typename T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const auto value = [](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    if constexpr (std::is_same_v<T, __half>)
      return __half2float({half});
    else
      return __bfloat162float({half});
  };
  return pack<T>(value(a) + value(b), value(a >> 16) + value(b >> 16));
}

template <typename T>
uint32_t pack_relu(float lower, float upper) {
  return pack<T>(lower < 0.f ? 0.f : lower, upper < 0.f ? 0.f : upper);
}

inline uint32_t spread_byte_signs(uint32_t bytes, uint32_t selectors) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15;
    if (selector < 8 || selector > 11) emulator::fail("spread_byte_signs: expected selectors of signs of four bytes");
    if (bytes >> (selector % 8 * 8 + 7) & 1) mask |= 0xFFu << (8 * i);
  }
  return mask;
}

inline uint32_t join_bytes(uint32_t a, uint32_t b) {
  return (a & 0xFF) | (a >> 16 & 0xFF) << 8 | (b & 0xFF) << 16 | (b >> 16 & 0xFF) << 24;
}

inline uint32_t ones(uint32_t pair) { return (pair & 0xFFFFu ? 1u : 0u) | (pair >> 16 ? 0x10000u : 0u); }

inline void wgmma_fence() { emulator::meet_warp("wgmma.fence"); }

inline void wgmma_commit() {
  emulator::meet_warp("wgmma.commit_group");
  emulated::Pending& p = emulated::pending()[emulator::current];
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

template <int kPending>
void wgmma_wait() {
  emulated::Pending& p = emulated::pending()[emulator::current];
  while (p.groups.size() > kPending) {
    if (!p.at_once)
      for (const emulated::Product& product : p.groups.front()) emulated::multiply(product);
    p.groups.erase(p.groups.begin());
  }
  emulator::meet_warp("wgmma.wait_group");  // after it no lane of the warp reads the operands any more
}

// Where the accumulators are used from on: nothing may still be added to them.
inline void wgmma_settle(float (&d)[128]) {
  const emulated::Pending& p = emulated::pending()[emulator::current];
  if (!p.groups.empty() || !p.open.empty()) emulator::fail("accumulators used before their products are complete");
  static_cast<void>(d);
}

template <typename T>
void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  emulator::meet_warp("wgmma.mma_async");
  constexpr auto kType = std::is_same_v<T, float>    ? emulated::Type::tf32
                         : std::is_same_v<T, __half> ? emulated::Type::f16
                                                     : emulated::Type::bf16;
  const emulated::Product product{d, a, b, accumulate != 0, kType};
  emulated::Pending& p = emulated::pending()[emulator::current];
  if (p.at_once) emulated::multiply(product);
  p.open.push_back(product);
}

}  // namespace widedeep::kernels::sm90
