#include "sm90_state.h"

#include <bit>
#include <cstring>
#include <map>
#include <memory>

namespace emulator::sm90 {

namespace {

struct Barrier {
  int64_t expected, pending, bytes;  // bytes: the tx-count, below zero where copies land before they are announced
  uint64_t phase;
  const Thread* unfenced;  // who initialised it, until that thread's fence.mbarrier_init
};

constexpr int64_t kMostCount = (1 << 20) - 1;      // of arrivals; and of bytes, above and below zero
constexpr uint64_t kMark = 0xBA881E88BA881E88ull;  // what an initialised barrier holds: it must not be written over

std::map<std::pair<const void*, uint32_t>, Barrier> barriers;

Barrier& barrier_at(const Block& block, uint32_t address) {
  uint64_t held;
  std::memcpy(&held, shared_at(block, address, 8), 8);
  if (address % 8 != 0 || held != kMark) fail("use of an mbarrier that was not initialised or was written over");
  Barrier& b = barriers.at({&block, address});
  const bool outside = !current || current->block != &block;  // a copy, or another block's thread
  if (outside && b.unfenced) fail("use of an mbarrier from outside of its block without fence.mbarrier_init");
  return b;
}

void complete(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects");
  if (b.bytes < -kMostCount || b.bytes > kMostCount) fail("more bytes at an mbarrier than it can count");
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.expected;
  }
  change();
}

struct Pending {
  std::vector<std::vector<Product>> groups;  // committed, oldest first
  std::vector<Product> open;
  bool fenced = false;                       // since the accumulators were last used by anything but products
  const bool at_once = random_number() & 1;  // products are taken when they are issued, not when waited for
};

std::map<const Thread*, Pending> pending;

// To nearest, ties away from zero: what the copy engine does to a float on its way to a TF32 operand.
float rounded_to_tf32(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  return (bits & 0x7F800000u) == 0x7F800000u ? v : std::bit_cast<float>((bits + 0x1000u) & ~0x1FFFu);
}

// What a copy reads: the rows of the box one after the other, zeros where they lie outside of the matrix.
using Box = std::vector<uint8_t>;

Box read_box(const CUtensorMap& map, int32_t k, int32_t row) {
  const size_t size = map.element;
  Box box(size_t{map.box_rows} * map.box_columns * size);
  uint8_t* to = box.data();
  for (int64_t line = row; line < int64_t{row} + map.box_rows; ++line)
    for (int64_t column = k; column < int64_t{k} + map.box_columns; ++column, to += size) {
      if (column < 0 || line < 0 || column >= int64_t(map.columns) || line >= int64_t(map.rows)) continue;
      const uint8_t* const from = map.base + line * map.pitch + column * size;
      check_access(from, size);
      std::memcpy(to, from, size);
      if (size != 4) continue;
      float value;
      std::memcpy(&value, to, 4);
      value = rounded_to_tf32(value);
      std::memcpy(to, &value, 4);
    }
  return box;
}

}  // namespace

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  if (arrivals < 1 || arrivals > kMostCount) fail("an mbarrier for too few or too many arrivals");
  std::memcpy(shared_at(*current->block, barrier, 8), &kMark, 8);
  barriers[{current->block, barrier}] = {arrivals, arrivals, 0, 0, current};
  std::erase_if(pending, [](const auto& of) { return of.first->block == current->block; });
}

void barrier_expect(uint32_t barrier, uint32_t bytes) {
  Barrier& b = barrier_at(*current->block, barrier);
  b.bytes += bytes;
  --b.pending;
  complete(b);
}

void barrier_arrive(const Block& block, uint32_t barrier) {
  Barrier& b = barrier_at(block, barrier);
  --b.pending;
  complete(b);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  const Block& block = *current->block;
  wait_until([&] { return (barrier_at(block, barrier).phase & 1) != parity; }, "mbarrier wait");
}

void fence_barriers() {
  for (auto& [where, barrier] : barriers)
    if (barrier.unfenced == current) barrier.unfenced = nullptr;
}

void copy_box(uint32_t target, const CUtensorMap& map, int32_t k, int32_t row, uint32_t barrier, uint16_t blocks) {
  const uint32_t row_bytes = map.box_columns * map.element;
  const size_t bytes = size_t{map.box_rows} * row_bytes;
  if (target % 128 != 0) fail("the target of a copy must be aligned to 128 bytes");
  const auto read_early = random_number() & 1 ? std::make_shared<Box>(read_box(map, k, row)) : nullptr;
  const auto& all = current->block->cluster->blocks;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block* const block = all[rank];
    std::memset(shared_at(*block, target, bytes), 0xFF, bytes);
    later([=, map = map] {
      if (block->live == 0) fail("a copy lands in a block that has ended");
      const Box box = read_early ? *read_early : read_box(map, k, row);
      for (uint32_t chunk = 0; chunk < bytes; chunk += 16)
        std::memcpy(shared_at(*block, swizzled(target + chunk), 16), &box[chunk], 16);
      Barrier& b = barrier_at(*block, barrier);
      b.bytes -= static_cast<int64_t>(bytes);
      complete(b);
    });
  }
}

void products_fence() { pending[current].fenced = true; }

void products_add(const Product& product) {
  Pending& p = pending[current];
  if (!p.fenced) fail("a product without wgmma.fence since its accumulators were used");
  if (p.at_once) multiply(product);
  p.open.push_back(product);
}

void products_commit() {
  Pending& p = pending[current];
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

void products_wait(size_t left) {
  Pending& p = pending[current];
  while (p.groups.size() > left) {
    if (!p.at_once)
      for (const Product& product : p.groups.front()) multiply(product);
    p.groups.erase(p.groups.begin());
  }
}

void products_settle() {
  Pending& p = pending[current];
  if (!p.groups.empty() || !p.open.empty()) fail("accumulators used before their products are complete");
  p.fenced = false;
}

}  // namespace emulator::sm90
