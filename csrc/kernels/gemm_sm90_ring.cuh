// Of the Hopper products: the ring of shared-memory stages that one thread feeds and two warpgroups read. Included by
// gemm_sm90_rows.cuh alone.
#pragma once
#include "kernels/gemm_sm90_chain.cuh"

namespace widedeep::kernels::sm90 {

// What those who multiply must know of a tile: it comes with its first stage.
struct Head {
  int32_t stages;
  float scale;
};

constexpr int kStages = 3, kAStage = kRows * kSlice, kBStage = kColumns * kSlice, kStage = kAStage + kBStage;

struct Ring {
  alignas(1024) uint8_t stages[kStages][kStage];
  alignas(8) uint64_t full[kStages], empty[kStages];
  Head heads[kStages];
  int32_t stored;  // a tile of which is known that what it reads is stored
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a reader or writer of the ring stands. The first pass over the ring has parity 0.
struct Turn {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// A shared address as a number that a warp's lanes have from one of them: the compiler then keeps it, where it would
// compute it anew at each use, and knows it for the same in all lanes.
__device__ __forceinline__ uint32_t kept_address(const void* p) { return __shfl_sync(0xFFFFFFFFu, smem_address(p), 0); }

// Every multiplying warp of both blocks says by itself that it has read a stage: a warp's wait covers its own quarter
// of a wgmma.
constexpr uint32_t kReaders = 2 * 4 * kCluster;

__device__ __forceinline__ void init_ring(Ring& ring) {
  for (int stage = 0; stage < kStages; ++stage) {
    barrier_init(smem_address(&ring.full[stage]), 1);
    barrier_init(smem_address(&ring.empty[stage]), kReaders);
  }
  ring.stored = -1;
}

// Another thread asks for the one that feeds the ring, while that is busy with the tile before: the answer comes from
// the L2 cache, and copies that wait for it are late.
__device__ __forceinline__ void look_ahead(Ring& ring, const Params& p, const Place& at, int tile) {
  if (at.link == 0) return;
  const Needed needed = needed_by(p, at);
  if (counter_reached(needed.counter, needed.parts)) note_tell(&ring.stored, tile);
}

// `base`: kept_address of the ring. By one thread.
template <typename T>
__device__ __forceinline__ void produce(Ring& ring, uint32_t base, const Params& p) {
  constexpr int kDepth = kSlice / static_cast<int>(sizeof(T));
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  const uint32_t full = base + offsetof(Ring, full), empty = base + offsetof(Ring, empty);
  const uint32_t half = kAStage + rank * (kBStage / kCluster);  // of B's tile, which this block loads for both
  Turn turn;
  start_apart(p, clusters);
  Place next = place_of(p, blockIdx.x / kCluster);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const Place at = next;
    const Link& link = p.link[at.link];
    const Head head{link.stages, link.scale};
    const int32_t row = (at.m * kCluster + rank) * kRows, column = at.n * kColumns + rank * (kColumns / kCluster);
    if (at.link > 0 && note_read(&ring.stored) != tile) {
      const Needed needed = needed_by(p, at);
      counter_wait(needed.counter, needed.parts);
    }
    for (int k = 0; k < head.stages; ++k, turn.advance()) {
      const uint32_t target = base + turn.stage * kStage, loaded = full + turn.stage * 8;
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
      if (k == 0) ring.heads[turn.stage] = head;
      barrier_expect(loaded, kStage);
      tma_load(target, &link.a, k * kDepth, row, loaded);
      tma_load_multicast(target + half, &link.b, k * kDepth, column, loaded, 0b11);
      // While there is time: the next stage is not empty yet.
      if (k == 0 && tile + clusters < p.tiles) next = place_of(p, tile + clusters);
    }
  }
}

// A multiplying warp at the ring.
template <typename T>
struct Reader {
  uint32_t base;     // kept_address of the ring
  uint64_t a, b;     // the operands in the first stage
  uint32_t emptied;  // where the lane says that the first stage has been read
  bool tells;        // whether it does: a lane for each block of the cluster
  Turn turn{};

  __device__ __forceinline__ Reader(uint32_t ring, int group) : base(ring) {
    const uint32_t lane = threadIdx.x % 32;
    a = operand(ring + group * (kAStage / 2));
    b = operand(ring + kAStage);
    emptied = remote_address(ring + offsetof(Ring, empty), lane % kCluster);
    tells = lane < kCluster;
  }

  __device__ __forceinline__ void wait() const {
    barrier_wait(base + offsetof(Ring, full) + turn.stage * 8, turn.parity);
  }

  template <bool kFirst>
  __device__ __forceinline__ void issue(float (&acc)[128]) const {
    const uint64_t first_a = moved(a, turn.stage * kStage), first_b = moved(b, turn.stage * kStage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSlice / 32; ++step)
      wgmma<T>(acc, moved(first_a, step * 32), moved(first_b, step * 32), !kFirst || step > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void release(uint32_t stage) const {
    barrier_arrive_remote_if(emptied + stage * 8, tells);
  }

  // The product of one tile, of which a warpgroup has its 64 rows. A stage is handed back to both producers of the
  // cluster once the next stage's wgmmas are in flight. meanwhile(): what else is done while the last ones are. Returns
  // the tile's scale.
  template <typename F>
  __device__ __forceinline__ float multiply(const Ring& ring, float (&acc)[128], F meanwhile) {
    wait();
    issue<true>(acc);
    const Head head = ring.heads[turn.stage];
    uint32_t before = turn.stage;
    turn.advance();
    for (int rest = __shfl_sync(0xFFFFFFFFu, head.stages, 0) - 1; rest > 0; --rest) {
      wait();
      issue<false>(acc);
      wgmma_wait<1>();
      release(before);
      before = turn.stage;
      turn.advance();
    }
    meanwhile();
    wgmma_wait<0>();
    wgmma_settle(acc);
    release(before);
    return head.scale;
  }
};

// The block's shared memory, from where a swizzle pattern begins. An offset, not a rounded number: so the compiler
// knows that these are shared addresses.
template <typename Shared>
__device__ __forceinline__ Shared& swizzle_aligned(uint8_t* raw) {
  return *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
}

#endif

}  // namespace widedeep::kernels::sm90
