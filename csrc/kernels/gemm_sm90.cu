// A persistent grid of two-block clusters. In a block one thread feeds a ring of shared-memory stages by TMA, two
// warpgroups multiply, each its 64 rows of a tile of 128 x 256, and three warps finish what they hand over while they
// multiply the next tile. The blocks of a cluster hold neighbouring row tiles of the same columns, so each loads half of
// B's tile and multicasts it to both.
#include "kernels/gemm_sm90_epilogue.cuh"
#include "kernels/tensor_map.h"

namespace widedeep::kernels {
namespace {

using namespace sm90;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kAhead = 5;  // stages by which rows of A come into the second-level cache before the ring

// Where a reader or writer of the ring stands. The first pass over the ring has parity 0.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return stage > 0 ? stage - 1 : kStages - 1; }
};

template <typename T>
__device__ __forceinline__ void produce(Shared& s, const Params& p, const CUtensorMap* a, const CUtensorMap* b) {
  const int rank = static_cast<int>(cluster_rank()), clusters = gridDim.x / kCluster;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  const auto row_of = [&](int tile) { return (tile / p.tiles_n * kCluster + rank) * kRows; };
  Turn turn;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const int32_t row = row_of(tile), column = tile % p.tiles_n * kColumns + rank * (kColumns / kCluster);
    for (int k = 0; k < p.depth_blocks; ++k, turn.advance()) {
      const uint32_t full = smem_address(&s.full[turn.stage]);
      // A new barrier answers at once for the parity before its first: the first pass finds every stage empty.
      barrier_wait(smem_address(&s.empty[turn.stage]), turn.parity ^ 1);
      barrier_expect(full, kAStage + kBStage);
      const uint32_t target = smem_address(s.stages[turn.stage]);
      tma_load(target, a, k * kDepth, row, full);
      tma_load_multicast(target + kAStage + rank * (kBStage / kCluster), b, k * kDepth, column, full, 0b11);
      // A comes from device memory, further away than the ring is long: one of its readers fetches it ahead.
      const int ahead = k + kAhead < p.depth_blocks ? tile : tile + clusters;
      const int at = k + kAhead - (ahead == tile ? 0 : p.depth_blocks);
      if (ahead < p.tiles && at % p.tiles_n == ahead % p.tiles_n) tma_prefetch(a, at * kDepth, row_of(ahead));
    }
  }
}

// Every multiplying warp of both blocks says by itself that it has read a stage: a warp's wait covers its own quarter of
// a wgmma.
constexpr uint32_t kReaders = 2 * 4 * kCluster;

__device__ __forceinline__ void release(Shared& s, int stage) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < kCluster) barrier_arrive_at(smem_address(&s.empty[stage]), lane);
}

// The bias of a warpgroup's tile. While its first products run; the barriers keep the tile before and this one apart.
template <typename T>
__device__ __forceinline__ void load_offset(Shared& s, const Params& p, float scale, int group, int column) {
  const auto* const bias = static_cast<const T*>(p.bias);
  named_barrier(1 + group, 128);
  for (int n = threadIdx.x % 128; n < kColumns; n += 128)
    s.offset[group][n] = column + n < p.N ? to_float(bias[column + n]) * scale : 0.f;
  named_barrier(1 + group, 128);
}

// The product of one tile. A stage is handed back to both producers of the cluster once the next stage's wgmmas are in
// flight.
template <typename T, typename F>
__device__ __forceinline__ void multiply(Shared& s, float (&acc)[128], Turn& turn, int depth_blocks, int group,
                                         F meanwhile) {
  for (int k = 0; k < depth_blocks; ++k) {
    barrier_wait(smem_address(&s.full[turn.stage]), turn.parity);
    const uint32_t stage = smem_address(s.stages[turn.stage]);
    const uint64_t a = operand(stage + group * (kAStage / 2)), b = operand(stage + kAStage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepthBytes / 32; ++step)
      wgmma<T>(acc, a + step * kStep, b + step * kStep, k > 0 || step > 0);
    wgmma_commit();
    if (k == 0) meanwhile();
    wgmma_wait<1>();
    if (k > 0) release(s, turn.before());
    turn.advance();
  }
  wgmma_wait<0>();
  wgmma_settle(acc);
  release(s, turn.before());
}

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void consume(Shared& s, const Params& p) {
  const int group = threadIdx.x / 128 - 1, clusters = gridDim.x / kCluster;
  const float scale = kEpilogue == Epilogue::kGradient ? p.scale : kFlag ? p.dropout.scale : 1.f;
  float acc[128];
  Turn turn;
  uint32_t parity = 1;  // nothing waits to be taken at first
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    multiply<T>(s, acc, turn, p.depth_blocks, group, [&] {
      if (kEpilogue == Epilogue::kForward) load_offset<T>(s, p, scale, group, tile % p.tiles_n * kColumns);
    });
    const auto hand = [&]<int kTurn>() {
      barrier_wait(smem_address(&s.taken[group]), parity);
      parity ^= 1;
      hand_over<T, kEpilogue, kTurn>(s, acc, scale, group);
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(smem_address(&s.ready[group]));
    };
    hand.template operator()<0>();
    if constexpr (kTurns<T> > 1) hand.template operator()<1>();
  }
}

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void finish(Shared& s, const Params& p) {
  constexpr bool kForward = kEpilogue == Epilogue::kForward;
  constexpr int kTileMask = kRows * kColumns / 8;
  const int clusters = gridDim.x / kCluster, first = threadIdx.x / 32 - 1;
  const auto step = static_cast<uint64_t>(kForward && kFlag ? *p.dropout.step : 0);
  const core::Dropout drop{static_cast<uint32_t>(p.dropout.seed),
                           static_cast<uint32_t>(p.dropout.seed >> 32),
                           static_cast<uint32_t>(step),
                           static_cast<uint32_t>(step >> 32),
                           p.dropout.layer << 24,
                           p.dropout.threshold,
                           p.dropout.scale};
  const auto mask_of = [&](int tile) {
    const int64_t tile_m = tile / p.tiles_n * kCluster + static_cast<int>(cluster_rank());
    return p.mask ? p.mask + (tile_m * p.tiles_n + tile % p.tiles_n) * kTileMask : nullptr;
  };
  uint32_t parity = 0, bad = 0;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const int tile_m = tile / p.tiles_n * kCluster + static_cast<int>(cluster_rank());
    const int column = tile % p.tiles_n * kColumns;
    if (!kForward && kFlag && first == 0 && tile + clusters < p.tiles)  // the next tile's mask: a line for each lane
      asm volatile("prefetch.global.L1 [%0];" ::"l"(mask_of(tile + clusters) + threadIdx.x % 32 * 128));
    uint8_t* mask = mask_of(tile);
    float sums[kTurns<T>][8] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns<T>; ++turn, parity ^= 1)
#pragma unroll 1
      for (int group = 0; group < 2; ++group) {
        barrier_wait(smem_address(&s.ready[group]), parity);
        uint8_t* const rows = mask ? mask + (group * kTurns<T> + turn) * kGroupRows * kRowMask<T> : nullptr;
        finish_rows<T, kEpilogue, kFlag>(s.out[group], p, drop, first, tile_m * kRows + group * kGroupRows,
                                         column + turn * kHanded<T>, rows, sums[turn], bad);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(smem_address(&s.taken[group]));
      }
    if (!kForward && p.column_sums) add_warps<T>(s, p, sums, first, tile_m, column);
  }
  if (kHalf<T> && !kForward && !kFlag && p.found_inf && (bad & 0x80008000u)) *p.found_inf = 1.f;  // all write the same
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
    for (int group = 0; group < 2; ++group) {
      barrier_init(smem_address(&s.ready[group]), 4);  // a warpgroup's warps
      barrier_init(smem_address(&s.taken[group]), kFinishers);
    }
    fence_barrier_init();
  }
  __syncwarp();  // the cluster barriers want whole warps
  cluster_sync();
  if (threadIdx.x < 128) {
    register_shrink<104>();
    if (threadIdx.x == 0) {
      prefetch_map(&a);
      prefetch_map(&b);
      produce<T>(s, p, &a, &b);
    } else if (threadIdx.x >= 32) {
      finish<T, kEpilogue, kFlag>(s, p);
    }
  } else {
    register_grow<200>();
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

int64_t sm90_strips(int64_t M) { return ceil_div(M, kCluster * kRows) * kCluster; }
int64_t sm90_mask_bytes(int64_t M, int64_t N) {
  return ceil_div(M, kCluster * kRows) * kCluster * ceil_div(N, kColumns) * (kRows * kColumns / 8);
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
  p.mask = static_cast<uint8_t*>(mask);
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
  p.mask = static_cast<uint8_t*>(const_cast<void*>(mask));
  p.scale = scale;
  p.column_sums = column_sums;
  p.found_inf = found_inf;
  return dispatch(shape.dtype, [&]<typename T>() {
    return mask ? launch<T, Epilogue::kGradient, true>(dz, weight_t, p, shape, stream)
                : launch<T, Epilogue::kGradient, false>(dz, weight_t, p, shape, stream);
  });
}

}  // namespace widedeep::kernels
