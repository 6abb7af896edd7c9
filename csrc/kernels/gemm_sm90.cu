// A persistent grid of two-block clusters. In a block one thread feeds a ring of shared-memory stages by TMA, and two
// warpgroups multiply, each its 64 rows of a tile of 128 x 256. The blocks of a cluster hold neighbouring row tiles of
// the same columns, so each loads half of B's tile and multicasts it to both.
//
// The warpgroups share the stages but not the clock: the second starts a little later, and so the tensor cores have its
// products while the first is in its epilogue, and the other way round.
#include "kernels/gemm_sm90_epilogue.cuh"
#include "kernels/tensor_map.h"

namespace widedeep::kernels {
namespace {

using namespace sm90;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kApart = 2;  // stages by which the second warpgroup starts later

// Where a reader or writer of the ring stands. The first pass over the ring has parity 0.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return stage > 0 ? stage - 1 : kStages - 1; }
};

// Clusters that have a tile less than others lose nothing by starting later, each a little more: so not all store their
// tiles, and load the next, at the same time.
__device__ __forceinline__ void start_apart(const Params& p, int clusters) {
  const int cluster = blockIdx.x / kCluster, rest = p.tiles % clusters;
  constexpr int kStageCycles = 1024;  // of the tensor cores
  if (p.tiles > clusters && rest > 0 && cluster >= rest)
    pause(static_cast<uint32_t>(kStageCycles * p.depth_blocks / (clusters - rest) * (cluster - rest)));
}

template <typename T>
__device__ __forceinline__ void produce(Shared& s, const Params& p, const CUtensorMap* a, const CUtensorMap* b) {
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  Turn turn;
  start_apart(p, clusters);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const int32_t row = (tile / p.tiles_n * kCluster + rank) * kRows;
    const int32_t column = tile % p.tiles_n * kColumns + rank * (kColumns / kCluster);
    for (int k = 0; k < p.depth_blocks; ++k, turn.advance()) {
      const uint32_t full = smem_address(&s.full[turn.stage]);
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(smem_address(&s.empty[turn.stage]), turn.parity ^ 1);
      barrier_expect(full, kAStage + kBStage);
      const uint32_t target = smem_address(s.stages[turn.stage]);
      tma_load(target, a, k * kDepth, row, full);
      tma_load_multicast(target + kAStage + rank * (kBStage / kCluster), b, k * kDepth, column, full, 0b11);
    }
  }
}

// Every consuming warp of both blocks says by itself that it has read a stage: a warp's wait covers its own quarter of
// a wgmma.
constexpr uint32_t kReaders = kConsumers / 32 * kCluster;

__device__ __forceinline__ void release(Shared& s, int stage) {
  uint32_t lane;  // read anew: kept, it would cost a register that the accumulators need
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  if (lane < kCluster) barrier_arrive_at(smem_address(&s.empty[stage]), lane);
}

// The product of one tile. A stage is handed back to both producers of the cluster once the next stage's wgmmas are in
// flight. `apart` is arrived at after kApart stages, or never.
template <typename T>
__device__ __forceinline__ void multiply(Shared& s, float (&acc)[128], Turn& turn, int depth_blocks, int group,
                                         bool& first) {
  for (int k = 0; k < depth_blocks; ++k) {
    barrier_wait(smem_address(&s.full[turn.stage]), turn.parity);
    const uint32_t stage = smem_address(s.stages[turn.stage]);
    const uint64_t a = operand(stage + group * (kAStage / 2)), b = operand(stage + kAStage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepthBytes / 32; ++step)
      wgmma<T>(acc, a + step * kStep, b + step * kStep, k > 0 || step > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0) release(s, turn.before());
    if (first && group == 0 && (k == kApart - 1 || k == depth_blocks - 1)) {
      if (threadIdx.x % 32 == 0) barrier_arrive(smem_address(&s.apart));
      first = false;
    }
    turn.advance();
  }
  wgmma_wait<0>();
  wgmma_settle(acc);
  release(s, turn.before());
}

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void consume(Shared& s, const Params& p) {
  const int group = threadIdx.x / 128 - 1;
  const int clusters = gridDim.x / kCluster;
  float acc[128];
  Turn turn;
  bool first = true;
  if (group == 1 && static_cast<int>(blockIdx.x) / kCluster < p.tiles) barrier_wait(smem_address(&s.apart), 0);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const auto mask_of = [&] {
      const int64_t tile_m = tile / p.tiles_n * kCluster + cluster_rank();
      return p.mask + (tile_m * p.tiles_n + tile % p.tiles_n) * kConsumers + threadIdx.x - 128;
    };
    if (kEpilogue == Epilogue::kGradient && kFlag)  // on its way during the product; held, it would cost four registers
      asm volatile("prefetch.global.L1 [%0];" ::"l"(mask_of()));
    multiply<T>(s, acc, turn, p.depth_blocks, group, first);
    asm volatile("" : "+r"(tile));  // its places are found anew, for the same reason
    const int tile_m = tile / p.tiles_n * kCluster + cluster_rank();
    const int tile_n = tile % p.tiles_n;
    if constexpr (kEpilogue == Epilogue::kForward)
      finish_forward<T, kFlag>(s, acc, p, tile_m, tile_n);
    else
      finish_gradient<T, kFlag>(s, acc, p, kFlag ? *mask_of() : uint4{}, tile_m, tile_n);
  }
}
#endif

template <typename T, Epilogue kEpilogue, bool kFlag>
__global__ void __launch_bounds__(kThreads, 1)
    linear_sm90_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                       const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  // An offset, not a rounded number: so the compiler knows that these are shared addresses.
  Shared& s = *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(smem_address(&s.full[stage]), 1);
      barrier_init(smem_address(&s.empty[stage]), kReaders);
    }
    barrier_init(smem_address(&s.apart), 4);  // a warpgroup's warps
    fence_barrier_init();
    if (kEpilogue == Epilogue::kForward && kFlag) s.step = static_cast<uint64_t>(*p.dropout.step);
  }
  __syncwarp();  // the cluster barriers want whole warps
  cluster_sync();
  if (threadIdx.x < 128) {
    register_shrink<40>();
    if (threadIdx.x == 0) {
      prefetch_map(&a);
      prefetch_map(&b);
      produce<T>(s, p, &a, &b);
    }
  } else {
    register_grow<232>();
    consume<T, kEpilogue, kFlag>(s, p);
  }
  __syncwarp();
  cluster_sync();  // a block stays until its peer's last multicast and arrivals have landed
#endif
}

template <typename T, Epilogue kEpilogue, bool kFlag>
cudaError_t launch(const void* a, const void* b, Params p, GemmSm90 shape, cudaStream_t stream) {
  int device = 0, major = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (major != 9) return cudaErrorNoKernelImageForDevice;
  if (shape.M == 0 || shape.N == 0) return cudaSuccess;
  if (shape.M > INT32_MAX - 256 || shape.N > INT32_MAX - 256) return cudaErrorInvalidValue;
  p.M = static_cast<int>(shape.M);
  p.N = static_cast<int>(shape.N);
  p.depth_blocks = static_cast<int>(ceil_div(shape.K * sizeof(T), kDepthBytes));
  p.tiles_n = static_cast<int>(ceil_div(shape.N, kColumns));
  p.tiles = static_cast<int>(ceil_div(shape.M, kCluster * kRows) * p.tiles_n);
  CUtensorMap map_a, map_b;
  if (const cudaError_t error = tensor_map(&map_a, a, shape.M, shape.K, kRows, shape.dtype)) return error;
  if (const cudaError_t error = tensor_map(&map_b, b, shape.N, shape.K, kColumns / kCluster, shape.dtype)) return error;
  auto* kernel = linear_sm90_kernel<T, kEpilogue, kFlag>;
  constexpr int kBytes = sizeof(Shared) + 1023;
  static_assert(kBytes <= 232448, "more shared memory than a Hopper block can have");
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  const int clusters = p.tiles < sms / kCluster ? p.tiles : sms / kCluster;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, p);
}

}  // namespace

int64_t sm90_strips(int64_t M) { return ceil_div(M, kCluster * kRows) * kCluster * 2; }
int64_t sm90_mask_bytes(int64_t M, int64_t N) {
  return ceil_div(M, kCluster * kRows) * kCluster * ceil_div(N, kColumns) * kConsumers * int64_t{sizeof(uint4)};
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

cudaError_t linear_forward_sm90(const void* x, const void* weight, const void* bias, void* y, void* mask,
                                GemmSm90 shape, DropoutArgs dropout, cudaStream_t stream) {
  Params p{};
  p.c = y;
  p.bias = bias;
  p.mask = static_cast<uint4*>(mask);
  p.dropout = dropout;
  return dispatch(shape.dtype, [&]<typename T>() {
    return dropout.threshold > 0 ? launch<T, Epilogue::kForward, true>(x, weight, p, shape, stream)
                                 : launch<T, Epilogue::kForward, false>(x, weight, p, shape, stream);
  });
}

cudaError_t linear_dgrad_sm90(const void* dz, const void* weight_t, const void* mask, float scale, void* dx,
                              float* column_sums, float* found_inf, GemmSm90 shape, cudaStream_t stream) {
  if (mask && found_inf) return cudaErrorInvalidValue;
  Params p{};
  p.c = dx;
  p.mask = static_cast<uint4*>(const_cast<void*>(mask));
  p.scale = scale;
  p.column_sums = column_sums;
  p.found_inf = found_inf;
  return dispatch(shape.dtype, [&]<typename T>() {
    return mask ? launch<T, Epilogue::kGradient, true>(dz, weight_t, p, shape, stream)
                : launch<T, Epilogue::kGradient, false>(dz, weight_t, p, shape, stream);
  });
}

}  // namespace widedeep::kernels
