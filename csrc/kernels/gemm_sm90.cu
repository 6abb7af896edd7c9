// A persistent grid of two-block clusters. In a block one thread feeds a ring of shared-memory stages by TMA, and two
// warpgroups multiply, each its 64 rows of a tile of 128 x 256. The blocks of a cluster hold neighbouring row tiles of
// the same columns, so each loads half of B's tile and multicasts it to both.
//
// The warpgroups only multiply: three warps beside the one that feeds the ring finish what they hand over while they
// multiply the next tile. So the tensor cores wait for the hand-over alone.
#include "kernels/gemm_sm90_rows.cuh"

namespace widedeep::kernels {
namespace {

using namespace sm90;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The bias of a warpgroup's tile. While its first products run; the barriers keep the tile before and this one apart.
template <typename T>
__device__ __forceinline__ void load_offset(Shared& s, const Params& p, float scale, int group, int column) {
  const auto* const bias = static_cast<const T*>(p.bias);
  named_barrier(1 + group, 128);
  for (int n = threadIdx.x % 128; n < kColumns; n += 128)
    s.offset[group][n] = column + n < p.N ? to_float(bias[column + n]) * scale : 0.f;
  named_barrier(1 + group, 128);
}

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void consume(Shared& s, const Params& p) {
  const int group = threadIdx.x / 128 - 1, clusters = gridDim.x / kCluster;
  const float scale = kEpilogue == Epilogue::kGradient ? p.scale : kFlag ? p.dropout.scale : 1.f;
  float acc[128];
  Turn<kStages> turn;
  uint32_t parity = 1;  // nothing waits to be taken at first
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    multiply<T>(s.ring, acc, turn, p.depth_blocks, group, [&](int k) {
      if (kEpilogue == Epilogue::kForward && k == 0) load_offset<T>(s, p, scale, group, tile % p.tiles_n * kColumns);
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

// The blocks of kTogether rows that a warp finishes of 64: every third, the second warpgroup's beginning with another,
// so that over a tile each warp has five or six of the sixteen.
template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void finish(Shared& s, const Params& p) {
  constexpr bool kForward = kEpilogue == Epilogue::kForward;
  constexpr int kBlocks = kGroupRows / kTogether;
  const int clusters = gridDim.x / kCluster, warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
  const auto step = static_cast<uint64_t>(kForward && kFlag ? *p.dropout.step : 0);
  const core::Dropout drop = dropout_of(p.dropout, step);
  uint32_t parity = 0, bad = 0;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const int tile_m = tile / p.tiles_n * kCluster + static_cast<int>(cluster_rank()), tile_n = tile % p.tiles_n;
    Bits<T>* mask = static_cast<Bits<T>*>(p.mask) + lane;
    if (p.mask) mask += (int64_t{tile_m} * p.tiles_n + tile_n) * (2 * kTurns<T> * kBlocks * 32);
    float sums[kTurns<T>][8] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns<T>; ++turn, parity ^= 1)
#pragma unroll 1
      for (int group = 0; group < 2; ++group) {
        Bits<T>* const blocks = mask + (group * kTurns<T> + turn) * (kBlocks * 32);
        Bits<T> bits[3] = {};  // loaded while the rows are still to come
        const int first = (warp + group) % kFinishers;
        if (!kForward && kFlag)
#pragma unroll
          for (int i = 0; i < 3; ++i)
            if (first + i * kFinishers < kBlocks) bits[i] = blocks[(first + i * kFinishers) * 32];
        barrier_wait(smem_address(&s.ready[group]), parity);
#pragma unroll 1
        for (int block = first; block < kBlocks; block += kFinishers) {
          finish_rows<T, kEpilogue, kFlag>(s.out[group] + block * kTogether, p, drop,
                                           tile_m * kRows + group * kGroupRows + block * kTogether,
                                           tile_n * kColumns + turn * kHanded<T>, bits[0], sums[turn], bad);
          if (kForward && p.mask) blocks[block * 32] = bits[0];
          bits[0] = bits[1], bits[1] = bits[2];
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(smem_address(&s.taken[group]));
      }
    if (!kForward && p.column_sums) add_warps<T>(s, p, sums, warp, tile_m, tile_n * kColumns);
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
  Shared& s = swizzle_aligned<Shared>(raw);
  const auto init = [&] {
    for (int group = 0; group < 2; ++group) {
      barrier_init(smem_address(&s.ready[group]), 4);  // a warpgroup's warps
      barrier_init(smem_address(&s.taken[group]), kFinishers);
    }
  };
  const auto beside = [&] { finish<T, kEpilogue, kFlag>(s, p); };
  feed_and_multiply<T, 120, 192>(s, &a, &b, p, init, beside, [&] { consume<T, kEpilogue, kFlag>(s, p); });
#endif
}

template <Epilogue kEpilogue>
cudaError_t launch(bool flag, const void* a, const void* b, const Params& p, const GemmSm90& shape,
                   cudaStream_t stream) {
  static_assert(sizeof(Shared) + 1023 <= 232448, "more shared memory than a Hopper block can have");
  return dispatch(shape.dtype, [&]<typename T>() {
    auto* const kernel = flag ? linear_sm90_kernel<T, kEpilogue, true> : linear_sm90_kernel<T, kEpilogue, false>;
    return launch_clusters(kernel, sizeof(Shared), a, b, p, shape, stream);
  });
}

}  // namespace

int64_t sm90_strips(int64_t M) { return ceil_div(M, kCluster * kRows) * kCluster; }
int64_t sm90_mask_bytes(int64_t M, int64_t N) {
  return ceil_div(M, kCluster * kRows) * kCluster * ceil_div(N, kColumns) * (kRows * kColumns / 8);
}

cudaError_t linear_forward_sm90(const void* x, const void* weight, const void* bias, void* y, void* mask,
                                GemmSm90 shape, DropoutArgs dropout, cudaStream_t stream) {
  Params p{};
  p.c = y;
  p.bias = bias;
  p.mask = mask;
  p.dropout = dropout;
  return launch<Epilogue::kForward>(dropout.threshold > 0, x, weight, p, shape, stream);
}

cudaError_t linear_dgrad_sm90(const void* dz, const void* weight_t, const void* mask, float scale, void* dx,
                              float* column_sums, float* found_inf, GemmSm90 shape, cudaStream_t stream) {
  if (mask && found_inf) return cudaErrorInvalidValue;
  Params p{};
  p.c = dx;
  p.mask = const_cast<void*>(mask);
  p.scale = scale;
  p.column_sums = column_sums;
  p.found_inf = found_inf;
  return launch<Epilogue::kGradient>(mask != nullptr, dz, weight_t, p, shape, stream);
}

}  // namespace widedeep::kernels
