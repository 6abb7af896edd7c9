// A persistent grid of two-block clusters, as in gemm_sm90.cu, where each warpgroup finishes its own tile. Here two
// warpgroups only multiply, and three warps beside the one that feeds the ring finish what they hand over while they
// multiply the next tile: the tensor cores wait for the hand-over alone, but the ring has a stage less.
#include "kernels/gemm_sm90_relay.cuh"

namespace widedeep::kernels::sm90 {
namespace {

using namespace relay;

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

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void finish(Shared& s, const Params& p) {
  constexpr bool kForward = kEpilogue == Epilogue::kForward;
  constexpr int kTileMask = kRows * kColumns / 8;
  const int clusters = gridDim.x / kCluster, first = threadIdx.x / 32 - 1;
  const auto step = static_cast<uint64_t>(kForward && kFlag ? *p.dropout.step : 0);
  const core::Dropout drop = dropout_of(p.dropout, step);
  const auto mask_of = [&](int tile) {
    const int64_t tile_m = tile / p.tiles_n * kCluster + static_cast<int>(cluster_rank());
    return p.mask ? static_cast<uint8_t*>(p.mask) + (tile_m * p.tiles_n + tile % p.tiles_n) * kTileMask : nullptr;
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
#pragma unroll 1
        for (int r = first; r < kGroupRows; r += kFinishers * kTogether)
          finish_rows<T, kEpilogue, kFlag>(s.out[group], p, drop, r, tile_m * kRows + group * kGroupRows,
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
    linear_sm90_relay_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
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
  feed_and_multiply<T, 104, 200>(s, &a, &b, p, init, beside, [&] { consume<T, kEpilogue, kFlag>(s, p); });
#endif
}

template <Epilogue kEpilogue>
cudaError_t launch(bool flag, const void* a, const void* b, const Params& p, const GemmSm90& shape,
                   cudaStream_t stream) {
  static_assert(sizeof(Shared) + 1023 <= 232448, "more shared memory than a Hopper block can have");
  return dispatch(shape.dtype, [&]<typename T>() {
    auto* const kernel =
        flag ? linear_sm90_relay_kernel<T, kEpilogue, true> : linear_sm90_relay_kernel<T, kEpilogue, false>;
    return launch_clusters(kernel, sizeof(Shared), a, b, p, shape, stream);
  });
}

}  // namespace

cudaError_t launch_relay(Epilogue epilogue, bool flag, const void* a, const void* b, const Params& p,
                         const GemmSm90& shape, cudaStream_t stream) {
  return epilogue == Epilogue::kForward ? launch<Epilogue::kForward>(flag, a, b, p, shape, stream)
                                        : launch<Epilogue::kGradient>(flag, a, b, p, shape, stream);
}

}  // namespace widedeep::kernels::sm90
