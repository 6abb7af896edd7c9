// The functions of csrc/kernels/sm90.cuh as the PTX manual describes the instructions, written from the manual and not
// from that file (but for `operand`, plain arithmetic, which comes from there and is read back here bit by bit). What
// happens by itself happens late: a copy lands at some random time after it was issued and its target holds NaNs until
// then, and what it copies it has read when it was issued, or reads it when it lands, as a coin says; a product is
// taken when it is waited for, or at once, as a coin of the launch says.
#pragma once
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "sm90_state.h"

namespace widedeep::kernels::sm90 {

inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulator::current->block->window);
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulator::sm90::barrier_init(barrier, arrivals); }

inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulator::sm90::barrier_expect(barrier, bytes); }

inline void barrier_arrive(uint32_t barrier) { emulator::sm90::barrier_arrive(*emulator::current->block, barrier); }

inline uint32_t remote_address(uint32_t address, uint32_t rank) { return rank << 24 | address; }

inline void barrier_arrive_remote_if(uint32_t remote, bool wanted) {
  if (!wanted) return;
  const uint32_t rank = remote >> 24, barrier = remote & 0xFFFFFF;
  const auto& blocks = emulator::current->block->cluster->blocks;
  if (rank >= blocks.size()) emulator::fail("arrival at a block outside of the cluster");
  if (blocks[rank]->live == 0) emulator::fail("arrival at a block that has ended");
  emulator::sm90::barrier_arrive(*blocks[rank], barrier);
}

// Until the phase of this parity is complete; the phase before the first counts as complete, with parity 1.
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::sm90::barrier_wait(barrier, parity); }

inline void fence_barrier_init() { emulator::sm90::fence_barriers(); }
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
  emulator::sm90::copy_box(target, *map, k, row, barrier, blocks);
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
    __builtin_memcpy(emulator::shared_at(*emulator::current->block, address + lane % 4 * 4, 4), &pairs[matrix], 4);
  }
}

inline void store_if(void* to, uint4 v, bool wanted) {
  if (wanted) *static_cast<uint4*>(to) = v;
}

inline void wgmma_fence() {
  emulator::meet_warp("wgmma.fence");
  emulator::sm90::products_fence();
}

inline void wgmma_commit() {
  emulator::meet_warp("wgmma.commit_group");
  emulator::sm90::products_commit();
}

template <int kPending>
void wgmma_wait() {
  emulator::sm90::products_wait(kPending);
  emulator::meet_warp("wgmma.wait_group");  // after it no lane of the warp reads the operands any more
}

// Where the accumulators are used from on: nothing may still be added to them.
inline void wgmma_settle(float (&)[128]) { emulator::sm90::products_settle(); }

template <typename T>
void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  emulator::meet_warp("wgmma.mma_async");
  constexpr auto kType = std::is_same_v<T, float>    ? emulator::Operand::tf32
                         : std::is_same_v<T, __half> ? emulator::Operand::f16
                                                     : emulator::Operand::bf16;
  emulator::sm90::products_add({d, a, b, accumulate != 0, kType});
}

}  // namespace widedeep::kernels::sm90
