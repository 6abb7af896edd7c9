// A persistent grid of two-block clusters. In a block one thread feeds a ring of shared-memory stages by TMA, and two
// warpgroups multiply, each its 64 rows of a tile of 128 x 256. The blocks of a cluster hold neighbouring row tiles of
// the same columns, so each loads half of B's tile and multicasts it to both.
//
// The warpgroups share the stages but not the clock: the second starts a little later, and so the tensor cores have its
// products while the first is in its epilogue, and the other way round.
#include "kernels/gemm_sm90_epilogue.cuh"

namespace widedeep::kernels {
namespace {

using namespace sm90;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kApart = 2;  // stages by which the second warpgroup starts later

template <typename T, Epilogue kEpilogue, bool kFlag>
__device__ __forceinline__ void consume(Shared& s, const Params& p) {
  const int group = threadIdx.x / 128 - 1;
  const int clusters = gridDim.x / kCluster;
  float acc[128];
  Turn<kStages> turn;
  bool first = true;
  const auto let_go = [&](int k) {  // the other warpgroup, once or never
    if (!first || group != 0 || (k != kApart - 1 && k != p.depth_blocks - 1)) return;
    if (threadIdx.x % 32 == 0) barrier_arrive(smem_address(&s.apart));
    first = false;
  };
  if (group == 1 && static_cast<int>(blockIdx.x) / kCluster < p.tiles) barrier_wait(smem_address(&s.apart), 0);
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const auto mask_of = [&] {
      const int64_t tile_m = tile / p.tiles_n * kCluster + cluster_rank();
      return static_cast<uint4*>(p.mask) + (tile_m * p.tiles_n + tile % p.tiles_n) * kConsumers + threadIdx.x - 128;
    };
    if (kEpilogue == Epilogue::kGradient && kFlag)  // on its way during the product; held, it would cost four registers
      asm volatile("prefetch.global.L1 [%0];" ::"l"(mask_of()));
    multiply<T>(s.ring, acc, turn, p.depth_blocks, group, let_go);
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
  Shared& s = swizzle_aligned<Shared>(raw);
  const auto init = [&] {
    barrier_init(smem_address(&s.apart), 4);  // a warpgroup's warps
    if (kEpilogue == Epilogue::kForward && kFlag) s.step = static_cast<uint64_t>(*p.dropout.step);
  };
  feed_and_multiply<T, 40, 232>(s, &a, &b, p, init, [] {}, [&] { consume<T, kEpilogue, kFlag>(s, p); });
#endif
}

template <Epilogue kEpilogue>
cudaError_t launch(bool flag, const void* a, const void* b, const Params& p, const GemmSm90& shape,
                   cudaStream_t stream) {
  if (shape.relay) return launch_relay(kEpilogue, flag, a, b, p, shape, stream);
  static_assert(sizeof(Shared) + 1023 <= 232448, "more shared memory than a Hopper block can have");
  return dispatch(shape.dtype, [&]<typename T>() {
    auto* const kernel = flag ? linear_sm90_kernel<T, kEpilogue, true> : linear_sm90_kernel<T, kEpilogue, false>;
    return launch_clusters(kernel, sizeof(Shared), a, b, p, shape, stream);
  });
}

}  // namespace

int64_t sm90_strips(int64_t M, bool relay) { return ceil_div(M, kCluster * kRows) * kCluster * (relay ? 1 : 2); }
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
