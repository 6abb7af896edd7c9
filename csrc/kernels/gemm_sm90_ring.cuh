// Of the Hopper products: tiles, the ring of shared-memory stages that one thread feeds and two warpgroups read, and
// the launch. Included by gemm_sm90_rows.cuh alone.
#pragma once
#include "kernels/gemm_sm90.h"
#include "kernels/gemm_sm90_bits.cuh"
#include "kernels/sm90.cuh"
#include "kernels/tensor_map.h"

namespace widedeep::kernels::sm90 {

constexpr int kMaxLinks = kSm90Links;
constexpr int kThreads = 3 * 128;  // more would leave a thread fewer registers than a wgmma of this size needs
constexpr int kDepthBytes = 128;   // of K in a stage: one swizzle row
constexpr int kRoundsAhead = 3;  // tiles of every cluster between what a link writes and what the next one reads of it
constexpr int kAStage = kRows * kDepthBytes, kBStage = kColumns * kDepthBytes;

// One product of a chain: C [M, N] = A B^T. A is the C of the link before, of the first the chain's input.
struct Link {
  CUtensorMap a, b;
  int N;
  int depth_blocks;  // ceil(K / elements of a stage)
  int tiles_n;       // of 256 columns
  float scale;
  void* c;
  const void* bias;
  const void* keep;
  void* mask;
  float* column_sums;
};

// A cluster tile has 256 rows x 256 columns. The tiles are numbered band by band of rows; in a band link by link; of a
// link row by row. So what a tile reads was finished a while ago, and lies in the second-level cache still.
struct Params {
  Link link[kMaxLinks];
  int links, M, tiles_m;
  int band;               // rows of tiles that go through all links together
  int tiles_band, tiles;  // of a whole band, and of the launch
  int32_t* finished;      // [links - 1, 2 tiles_m]: the parts of a strip's rows that are stored
  float* found_inf;
};

enum class Epilogue { kForward, kGradient };

// Sets the shapes of link `at`, whose input has K columns.
inline cudaError_t set_link(Params& p, int at, const void* a, int64_t K, const void* b, int64_t N, core::DType dtype) {
  Link& link = p.link[at];
  if (N > INT32_MAX - 256) return cudaErrorInvalidValue;
  link.N = static_cast<int>(N);
  link.depth_blocks = static_cast<int>(ceil_div(K * core::bytes_of(dtype), kDepthBytes));
  link.tiles_n = static_cast<int>(ceil_div(N, kColumns));
  if (const cudaError_t error = tensor_map(&link.a, a, p.M, K, kRows, dtype)) return error;
  return tensor_map(&link.b, b, N, K, kColumns / kCluster, dtype);
}

// Cuts the rows into bands, for `clusters` of which each takes every so many-th tile.
inline cudaError_t set_tiles(Params& p, int clusters) {
  int all = 0, fewest = INT32_MAX;
  for (int i = 0; i < p.links; ++i) {
    all += p.link[i].tiles_n;
    fewest = p.link[i].tiles_n < fewest ? p.link[i].tiles_n : fewest;
  }
  if (int64_t{all} * p.tiles_m > INT32_MAX - clusters) return cudaErrorInvalidValue;
  const auto wanted = static_cast<int>(ceil_div(kRoundsAhead * clusters, fewest));
  const int bands = p.links > 1 && p.tiles_m > wanted ? p.tiles_m / wanted : 1;
  p.band = static_cast<int>(ceil_div(p.tiles_m, bands));
  p.tiles_band = p.band * all;
  p.tiles = p.tiles_m * all;
  return cudaSuccess;
}

// Clusters share the tiles, as many as the device runs at a time: links wait for each other's tiles. p has its links.
template <typename Kernel>
cudaError_t launch_clusters(Kernel kernel, size_t shared_bytes, Params& p, cudaStream_t stream) {
  int device = 0, sms = 0, clusters = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const auto bytes = static_cast<int>(shared_bytes + 1023);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(sms / kCluster * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  clusters = sms / kCluster;
  if (p.links > 1) {
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return error;
    clusters = clusters < sms / kCluster ? clusters : sms / kCluster;
    const size_t counters = sizeof(int32_t) * (p.links - 1) * p.tiles_m * kCluster;
    if (const cudaError_t error = cudaMemsetAsync(p.finished, 0, counters, stream)) return error;
  }
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = set_tiles(p, clusters)) return error;
  config.gridDim = dim3(static_cast<unsigned>((p.tiles < clusters ? p.tiles : clusters) * kCluster));
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Calls f.template operator()<T>() for the dtype.
template <typename F>
cudaError_t dispatch(core::DType dtype, F f) {
  switch (dtype) {
    case core::DType::f32:
      return f.template operator()<float>();
    case core::DType::f16:
      return f.template operator()<__half>();
    default:
      return f.template operator()<__nv_bfloat16>();
  }
}

template <int kStages>
struct Ring {
  alignas(1024) uint8_t stages[kStages][kAStage + kBStage];
  alignas(8) uint64_t full[kStages], empty[kStages];
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

template <int kStages>
__device__ __forceinline__ void init_ring(Ring<kStages>& ring) {
  for (int stage = 0; stage < kStages; ++stage) {
    barrier_init(smem_address(&ring.full[stage]), 1);
    barrier_init(smem_address(&ring.empty[stage]), kReaders);
  }
}

// Where a tile lies: row `m` of cluster tiles, column `n`.
struct Place {
  int link, m, n;
};

__device__ __forceinline__ Place place_of(const Params& p, int tile) {
  const int band = tile / p.tiles_band, first = band * p.band, rows = min(p.band, p.tiles_m - first);
  int rest = tile - band * p.tiles_band, link = 0;
  for (int size; rest >= (size = rows * p.link[link].tiles_n); ++link) rest -= size;
  const int across = p.link[link].tiles_n, down = rest / across;
  return {link, first + down, rest - down * across};
}

// The counter of a strip: 128 rows of a link's C.
__device__ __forceinline__ int32_t* counter_of(const Params& p, int link, int strip) {
  return p.finished + (link * p.tiles_m * kCluster + strip);
}

// Clusters that have a tile less than others lose nothing by starting later, each a little more: so not all store their
// tiles, and load the next, at the same time.
__device__ __forceinline__ void start_apart(const Params& p, int clusters) {
  const int cluster = blockIdx.x / kCluster, rest = p.tiles % clusters;
  constexpr int kStageCycles = 1024;  // of the tensor cores
  if (p.tiles > clusters && rest > 0 && cluster >= rest)
    pause(
        static_cast<uint32_t>(kStageCycles * p.link[p.links - 1].depth_blocks / (clusters - rest) * (cluster - rest)));
}

// kWriters: what a finished tile adds to the counter of a strip.
template <typename T, int kWriters, int kStages>
__device__ __forceinline__ void produce(Ring<kStages>& ring, const Params& p) {
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  Turn<kStages> turn;
  start_apart(p, clusters);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const Place at = place_of(p, tile);
    const Link& link = p.link[at.link];
    const int strip = at.m * kCluster + rank;
    const int32_t column = at.n * kColumns + rank * (kColumns / kCluster);
    if (at.link > 0) counter_wait(counter_of(p, at.link - 1, strip), kWriters * p.link[at.link - 1].tiles_n);
    for (int k = 0; k < link.depth_blocks; ++k, turn.advance()) {
      const uint32_t full = smem_address(&ring.full[turn.stage]);
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(smem_address(&ring.empty[turn.stage]), turn.parity ^ 1);
      barrier_expect(full, kAStage + kBStage);
      const uint32_t target = smem_address(ring.stages[turn.stage]);
      tma_load(target, &link.a, k * kDepth, strip * kRows, full);
      tma_load_multicast(target + kAStage + rank * (kBStage / kCluster), &link.b, k * kDepth, column, full, 0b11);
    }
  }
}

template <int kStages>
__device__ __forceinline__ void release(Ring<kStages>& ring, int stage) {
  uint32_t lane;  // read anew: kept, it would cost a register that the accumulators need
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  if (lane < kCluster) barrier_arrive_at(smem_address(&ring.empty[stage]), lane);
}

// The product of one tile, of which `group` has its 64 rows. A stage is handed back to both producers of the cluster
// once the next stage's wgmmas are in flight. issued(k): what else is done when those of stage k are.
template <typename T, int kStages, typename F>
__device__ __forceinline__ void multiply(Ring<kStages>& ring, float (&acc)[128], Turn<kStages>& turn, int depth_blocks,
                                         int group, F issued) {
  for (int k = 0; k < depth_blocks; ++k) {
    barrier_wait(smem_address(&ring.full[turn.stage]), turn.parity);
    const uint32_t stage = smem_address(ring.stages[turn.stage]);
    const uint64_t a = operand(stage + group * (kAStage / 2)), b = operand(stage + kAStage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepthBytes / 32; ++step)
      wgmma<T>(acc, a + step * kStep, b + step * kStep, k > 0 || step > 0);
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

// The frame of a kernel: the first warpgroup, whose first thread feeds the ring, gives registers to the two that
// multiply. init(): one thread sets up the barriers beside the ring's; beside(): what the first warpgroup's other warps
// do, each of kWriters of them a part of every tile; consume(): what those do that multiply.
template <typename T, int kFew, int kMany, int kWriters, typename Shared, typename Init, typename Beside,
          typename Consume>
__device__ __forceinline__ void feed_and_multiply(Shared& s, const Params& p, Init init, Beside beside,
                                                  Consume consume) {
  static_assert(kFew + 2 * kMany <= 3 * 168, "more registers than a block is given");
  if (threadIdx.x == 0) {
    init_ring(s.ring);
    init();
    fence_barrier_init();
  }
  __syncwarp();  // the cluster barriers want whole warps
  cluster_sync();
  if (threadIdx.x < 128) {
    register_shrink<kFew>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.links; ++i) {
        prefetch_map(&p.link[i].a);
        prefetch_map(&p.link[i].b);
      }
      produce<T, kWriters>(s.ring, p);
    } else if (threadIdx.x >= 32) {
      beside();
    }
  } else {
    register_grow<kMany>();
    consume();
  }
  __syncwarp();
  cluster_sync();  // a block stays until its peer's last multicast and arrivals have landed
}

// The block's shared memory, from where a swizzle pattern begins. An offset, not a rounded number: so the compiler
// knows that these are shared addresses.
template <typename Shared>
__device__ __forceinline__ Shared& swizzle_aligned(uint8_t* raw) {
  return *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
}

#endif

}  // namespace widedeep::kernels::sm90
