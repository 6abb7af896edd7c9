// The functions of csrc/kernels/sm90.cuh as the PTX manual describes the instructions, written from the manual and not
// from that file (but for `operand`, plain arithmetic, which comes from there and is read back here bit by bit). What
// happens by itself happens late: a copy lands at some random time after it was issued and its target holds NaNs until
// then, and what it copies it has read when it was issued, or reads it when it lands, as a coin says; a product is
// taken when it is waited for, or at once, as a coin of the launch says.
#pragma once
#include "kernels/sm90_state.cuh"

namespace widedeep::kernels::sm90 {

inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulator::current->block->window);
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  using namespace emulated;
  if (arrivals < 1 || arrivals > kMostCount) fail("an mbarrier for too few or too many arrivals");
  __builtin_memcpy(at(*current->block, barrier, 8), &kMark, 8);
  barriers()[{current->block, barrier}] = {arrivals, arrivals, 0, 0, current};
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

inline uint32_t remote_address(uint32_t address, uint32_t rank) { return rank << 24 | address; }

inline void barrier_arrive_remote_if(uint32_t remote, bool wanted) {
  if (!wanted) return;
  const uint32_t rank = remote >> 24, barrier = remote & 0xFFFFFF;
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

inline void fence_barrier_init() {
  for (auto& [where, barrier] : emulated::barriers())
    if (barrier.unfenced == emulator::current) barrier.unfenced = nullptr;
}
inline void prefetch_map(const CUtensorMap*) {}
inline bool elected() {
  emulator::meet_warp("elect.sync");
  return emulator::lane() == 0;
}
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
  const auto read_early = emulator::random_number() & 1 ? std::make_shared<Box>(read_box(*map, k, row)) : nullptr;
  const auto& all = current->block->cluster->blocks;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    emulator::Block* const block = all[rank];
    std::memset(at(*block, target, bytes), 0xFF, bytes);
    emulator::later([=, map = *map] {
      if (block->live == 0) fail("a copy lands in a block that has ended");
      const Box box = read_early ? *read_early : read_box(map, k, row);
      for (uint32_t chunk = 0; chunk < bytes; chunk += 16)
        __builtin_memcpy(at(*block, swizzled(target + chunk), 16), &box[chunk], 16);
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
inline bool counter_reached(const int32_t* counter, int32_t wanted) { return *counter >= wanted; }
inline void counter_wait(const int32_t* counter, int32_t wanted) {
  emulator::wait_until([=] { return *counter >= wanted; }, "wait for a counter");
}

inline void note_tell(int32_t* note, int32_t value) { *note = value; }
inline int32_t note_read(const int32_t* note) { return *note; }

inline void tma_load(uint32_t target, const CUtensorMap* map, int32_t k, int32_t row, uint32_t barrier) {
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

inline uint64_t moved(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
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

inline void wgmma_fence() {
  emulator::meet_warp("wgmma.fence");
  emulated::pending()[emulator::current].fenced = true;
}

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
  emulated::Pending& p = emulated::pending()[emulator::current];
  if (!p.groups.empty() || !p.open.empty()) emulator::fail("accumulators used before their products are complete");
  p.fenced = false;
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
  if (!p.fenced) emulator::fail("a product without wgmma.fence since its accumulators were used");
  if (p.at_once) emulated::multiply(product);
  p.open.push_back(product);
}

}  // namespace widedeep::kernels::sm90
