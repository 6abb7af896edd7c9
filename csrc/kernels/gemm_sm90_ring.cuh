// Of the Hopper products: the ring of shared-memory stages that one thread feeds and two warpgroups read. Included by
// gemm_sm90_rows.cuh alone.
#pragma once
#include "kernels/gemm_sm90_chain.cuh"

namespace widedeep::kernels::sm90 {

// kBytes: of a row of A and B in a stage, one swizzle row. All stages together have 144 KB.
template <int kBytes>
struct Ring {
  static constexpr int kStages = 3 * 128 / kBytes, kAStage = kRows * kBytes, kBStage = kColumns * kBytes;
  alignas(1024) uint8_t stages[kStages][kAStage + kBStage];
  alignas(8) uint64_t full[kStages], empty[kStages];
  int32_t stored;  // a tile of which is known that what it reads is stored
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a reader or writer of the ring stands. The first pass over the ring has parity 0.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return stage > 0 ? stage - 1 : kStages - 1; }
};

// Every multiplying warp of both blocks says by itself that it has read a stage: a warp's wait covers its own quarter
// of a wgmma.
constexpr uint32_t kReaders = 2 * 4 * kCluster;

template <int kBytes>
__device__ __forceinline__ void init_ring(Ring<kBytes>& ring) {
  for (int stage = 0; stage < ring.kStages; ++stage) {
    barrier_init(smem_address(&ring.full[stage]), 1);
    barrier_init(smem_address(&ring.empty[stage]), kReaders);
  }
  ring.stored = -1;
}

// Another thread asks for the one that feeds the ring, while that is busy with the tile before: the answer comes from
// the second-level cache, and copies that wait for it are late.
template <int kBytes>
__device__ __forceinline__ void look_ahead(Ring<kBytes>& ring, const Params& p, const Place& at, int tile) {
  if (at.link == 0) return;
  const Needed needed = needed_by(p, at);
  if (counter_reached(needed.counter, needed.parts)) note_tell(&ring.stored, tile);
}

template <typename T, int kBytes>
__device__ __forceinline__ void produce(Ring<kBytes>& ring, const Params& p) {
  constexpr int kAStage = Ring<kBytes>::kAStage, kBStage = Ring<kBytes>::kBStage;
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  constexpr int kDepth = kBytes / static_cast<int>(sizeof(T));
  const uint64_t policy = p.schedule.evict_first ? kEvictFirst : kKeepNormally;
  Turn<Ring<kBytes>::kStages> turn;
  start_apart(p, clusters);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const Place at = place_of(p, tile);
    const Link& link = p.link[at.link];
    const int strip = at.m * kCluster + rank;
    const int32_t column = at.n * kColumns + rank * (kColumns / kCluster);
    if (at.link > 0 && note_read(&ring.stored) != tile) {
      const Needed needed = needed_by(p, at);
      counter_wait(needed.counter, needed.parts);
    }
    for (int k = 0; k < link.stages; ++k, turn.advance()) {
      const uint32_t full = smem_address(&ring.full[turn.stage]);
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(smem_address(&ring.empty[turn.stage]), turn.parity ^ 1);
      barrier_expect(full, kAStage + kBStage);
      const uint32_t target = smem_address(ring.stages[turn.stage]);
      tma_load(target, &link.a, k * kDepth, strip * kRows, full, policy);
      tma_load_multicast(target + kAStage + rank * (kBStage / kCluster), &link.b, k * kDepth, column, full, 0b11);
    }
  }
}

template <int kBytes>
__device__ __forceinline__ void release(Ring<kBytes>& ring, int stage) {
  uint32_t lane;  // read anew: kept, it would cost a register that the accumulators need
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  if (lane < kCluster) barrier_arrive_at(smem_address(&ring.empty[stage]), lane);
}

// The product of one tile, of which `group` has its 64 rows. A stage is handed back to both producers of the cluster
// once the next stage's wgmmas are in flight. issued(k): what else is done when those of stage k are.
template <typename T, int kBytes, typename F>
__device__ __forceinline__ void multiply(Ring<kBytes>& ring, float (&acc)[128], Turn<Ring<kBytes>::kStages>& turn,
                                         int stages, int group, F issued) {
  constexpr int kAStage = Ring<kBytes>::kAStage;
  for (int k = 0; k < stages; ++k) {
    barrier_wait(smem_address(&ring.full[turn.stage]), turn.parity);
    const uint32_t stage = smem_address(ring.stages[turn.stage]);
    const uint64_t a = operand<kBytes>(stage + group * (kAStage / 2)), b = operand<kBytes>(stage + kAStage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBytes / 32; ++step) wgmma<T>(acc, a + step * kStep, b + step * kStep, k > 0 || step > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0) release(ring, turn.before());
    issued(k);
    turn.advance();
  }
  wgmma_wait<0>();
  wgmma_settle(acc);
  release(ring, turn.before());
}

// The block's shared memory, from where a swizzle pattern begins. An offset, not a rounded number: so the compiler
// knows that these are shared addresses.
template <typename Shared>
__device__ __forceinline__ Shared& swizzle_aligned(uint8_t* raw) {
  return *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
}

#endif

}  // namespace widedeep::kernels::sm90
