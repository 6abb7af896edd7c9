// Of the Hopper products: tiles, the ring of shared-memory stages that one thread feeds and two warpgroups read, and
// the launch. Included by gemm_sm90_rows.cuh alone.
#pragma once
#include "kernels/common.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/sm90.cuh"
#include "kernels/tensor_map.h"

namespace widedeep::kernels::sm90 {

constexpr int kRows = 128, kColumns = 256;  // of a tile of C
constexpr int kGroupRows = 64;              // of which each of two warpgroups has half
constexpr int kCluster = 2;
constexpr int kThreads = 3 * 128;  // more would leave a thread fewer registers than a wgmma of this size needs
constexpr int kDepthBytes = 128;   // of K in a stage: one swizzle row
constexpr int kAStage = kRows * kDepthBytes, kBStage = kColumns * kDepthBytes;

struct Params {
  int M, N;
  int depth_blocks;    // ceil(K / elements of a stage)
  int tiles_n, tiles;  // cluster tiles: 256 rows x 256 columns, columns fastest
  void* c;
  const void* bias;
  void* mask;
  float *column_sums, *found_inf;
  DropoutArgs dropout;
  float scale;
};

enum class Epilogue { kForward, kGradient };

// Whole cluster tiles share the multiprocessors of the device. kernel: (map of a, map of b, params).
template <typename Kernel>
cudaError_t launch_clusters(Kernel kernel, size_t shared_bytes, const void* a, const void* b, Params p,
                            const GemmSm90& shape, cudaStream_t stream) {
  int device = 0, major = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (major != 9) return cudaErrorNoKernelImageForDevice;
  if (shape.M == 0 || shape.N == 0) return cudaSuccess;
  if (shape.M > INT32_MAX - 256 || shape.N > INT32_MAX - 256) return cudaErrorInvalidValue;
  p.M = static_cast<int>(shape.M);
  p.N = static_cast<int>(shape.N);
  p.depth_blocks = static_cast<int>(ceil_div(shape.K * core::bytes_of(shape.dtype), kDepthBytes));
  p.tiles_n = static_cast<int>(ceil_div(shape.N, kColumns));
  p.tiles = static_cast<int>(ceil_div(shape.M, kCluster * kRows) * p.tiles_n);
  CUtensorMap map_a, map_b;
  if (const cudaError_t error = tensor_map(&map_a, a, shape.M, shape.K, kRows, shape.dtype)) return error;
  if (const cudaError_t error = tensor_map(&map_b, b, shape.N, shape.K, kColumns / kCluster, shape.dtype)) return error;
  const auto bytes = static_cast<int>(shared_bytes + 1023);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  const int clusters = p.tiles < sms / kCluster ? p.tiles : sms / kCluster;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, p);
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

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;

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

// Clusters that have a tile less than others lose nothing by starting later, each a little more: so not all store their
// tiles, and load the next, at the same time.
__device__ __forceinline__ void start_apart(const Params& p, int clusters) {
  const int cluster = blockIdx.x / kCluster, rest = p.tiles % clusters;
  constexpr int kStageCycles = 1024;  // of the tensor cores
  if (p.tiles > clusters && rest > 0 && cluster >= rest)
    pause(static_cast<uint32_t>(kStageCycles * p.depth_blocks / (clusters - rest) * (cluster - rest)));
}

template <typename T, int kStages>
__device__ __forceinline__ void produce(Ring<kStages>& ring, const Params& p, const CUtensorMap* a,
                                        const CUtensorMap* b) {
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  Turn<kStages> turn;
  start_apart(p, clusters);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const int32_t row = (tile / p.tiles_n * kCluster + rank) * kRows;
    const int32_t column = tile % p.tiles_n * kColumns + rank * (kColumns / kCluster);
    for (int k = 0; k < p.depth_blocks; ++k, turn.advance()) {
      const uint32_t full = smem_address(&ring.full[turn.stage]);
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(smem_address(&ring.empty[turn.stage]), turn.parity ^ 1);
      barrier_expect(full, kAStage + kBStage);
      const uint32_t target = smem_address(ring.stages[turn.stage]);
      tma_load(target, a, k * kDepth, row, full);
      tma_load_multicast(target + kAStage + rank * (kBStage / kCluster), b, k * kDepth, column, full, 0b11);
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
// do; consume(): what those do that multiply.
template <typename T, int kFew, int kMany, typename Shared, typename Init, typename Beside, typename Consume>
__device__ __forceinline__ void feed_and_multiply(Shared& s, const CUtensorMap* a, const CUtensorMap* b,
                                                  const Params& p, Init init, Beside beside, Consume consume) {
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
      prefetch_map(a);
      prefetch_map(b);
      produce<T>(s.ring, p, a, b);
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
