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

constexpr int kBound = kThreads;

template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void consume(Shared& s, uint32_t ring, const Params& p) {
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 128), 0) - 1;
  float acc[128];
  Reader<T> reader(ring, group);
  uint32_t parity = 0;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += gridDim.x / kCluster) {
    Shift shift[kAhead];
    const auto wait_taken = [&] {
      barrier_wait(smem_address(&s.taken[group]), parity);
      parity ^= 1;
    };
    const auto hand = [&]<int kTurn>(float scale) {
      hand_over<T, kEpilogue, kTurn>(s, acc, scale, group, shift);
      barrier_arrive(smem_address(&s.ready[group]));
    };
    const float scale = reader.multiply(s.ring, acc, [&] {
      wait_taken();
      load_shifts<kEpilogue>(s, group, 0, shift);
    });
    hand.template operator()<0>(scale);
    if constexpr (kTurns<T> > 1) {
      wait_taken();
      hand.template operator()<1>(scale);
    }
  }
}

// A warp finishes every third of a warpgroup's blocks of kTogether rows, the second warpgroup's beginning with another,
// so that over a tile each warp has five or six of the sixteen.
template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void finish(Shared& s, const Params& p) {
  constexpr bool kForward = kEpilogue == Epilogue::kForward;
  const int clusters = gridDim.x / kCluster, warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32;
  const int thread = warp * 32 + lane;
  uint32_t bad = 0, parity = 0;
  const bool drops = kForward && p.dropout.threshold != 0;
  const uint64_t step = drops ? static_cast<uint64_t>(*p.dropout.step) : 0;
  Place next = place_of(p, blockIdx.x / kCluster);
  // With the word that what was handed over is taken come the offsets of what is handed over next.
  Offsets offsets{};
  const auto taken = [&](int group) { barrier_arrive(smem_address(&s.taken[group])); };
  if (kForward) offsets = load_offsets<T>(p.link[next.link], next.n * kColumns, thread);
  for (int group = 0; group < 2; ++group) {
    if (kForward) store_offsets(s, offsets, group, thread);
    taken(group);
  }
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += clusters) {
    const Place at = next;
    if (tile + clusters < p.tiles) {
      next = place_of(p, tile + clusters);
      if (kForward) offsets = load_offsets<T>(p.link[next.link], next.n * kColumns, thread);
      if (warp == 0 && lane == 0) look_ahead(s.ring, p, next, tile + clusters);
    }
    const Link& link = p.link[at.link];
    const int strip = at.m * kCluster + static_cast<int>(cluster_rank());
    const auto* const mask = static_cast<const Bits<T>*>(kForward ? nullptr : link.mask);
    auto* const noted = static_cast<Bits<T>*>(kForward ? link.mask : nullptr);
    const bool some = kForward ? drops : mask != nullptr;  // whether bits say which values stay
    float sums[kTurns<T>][8] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns<T>; ++turn, parity ^= 1)
#pragma unroll 1
      for (int group = 0; group < 2; ++group) {
        const int64_t blocks = bits_at<T>(strip, link.tiles_n, at.n, group, turn, 0) + lane;
        const int first = (warp + group) % kFinishers;
        Bits<T> bits[kMostBlocks] = {};  // drawn or loaded while the rows are still to come
        if (drops)
          draw_blocks<T>(dropout_of(p.dropout, step, at.link), p.dropout.first_row + strip * kRows + group * kGroupRows,
                         at.n * kColumns + turn * kHanded<T> + lane * kLane<T>, first, bits);
        if (mask) load_blocks<T>(mask + blocks, first, bits);
        barrier_wait(smem_address(&s.ready[group]), parity);
        if (kForward && turn + 1 == kTurns<T>) store_offsets(s, offsets, group, thread);
#pragma unroll 1
        for (int block = first; block < kBlocks; block += kFinishers) {
          const auto rows = [&]<bool kFlag>() {
            return finish_rows<T, kEpilogue, kFlag>(s.out[group] + block * kTogether, p, link,
                                                    strip * kRows + group * kGroupRows + block * kTogether,
                                                    at.n * kColumns + turn * kHanded<T>, bits[0], sums[turn], bad);
          };
          const Bits<T> positive = some ? rows.template operator()<true>() : rows.template operator()<false>();
          if (noted) noted[blocks + block * 32] = positive;
          next_bits<T>(bits);
        }
        taken(group);
      }
    __syncwarp();  // the counter is for what all lanes have stored
    if (lane == 0 && at.link + 1 < p.links) counter_arrive(counter_of(p, at.link, strip));
    if (!kForward && link.column_sums) add_warps<T>(s, link, sums, warp, strip, at.n * kColumns);
  }
  if (kHalf<T> && !kForward && p.found_inf && (bad & 0x80008000u)) *p.found_inf = 1.f;  // all write the same
}
#else
constexpr int kBound = 1;  // other code is empty: launch_clusters knows it by this
#endif

template <typename T, Epilogue kEpilogue>
__global__ void __launch_bounds__(kBound, 1) linear_sm90_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  auto& s = swizzle_aligned<Shared>(raw);
  constexpr int kFew = 120, kMany = 192;  // registers: the first warpgroup gives some to the two that multiply
  static_assert(kFew + 2 * kMany <= 3 * 168, "more registers than a block is given");
  if (threadIdx.x == 0) {
    init_ring(s.ring);
    for (int group = 0; group < 2; ++group) {
      barrier_init(smem_address(&s.ready[group]), 128);
      barrier_init(smem_address(&s.taken[group]), kFinishing);
    }
    fence_barrier_init();
  }
  __syncwarp();  // the cluster barriers want whole warps
  cluster_sync();
  const uint32_t ring = kept_address(&s.ring);
  if (threadIdx.x < 128) {
    register_shrink<kFew>();
    if (threadIdx.x >= 32) {
      finish<T, kEpilogue>(s, p);
    } else if (elected()) {
      for (int i = 0; i < p.links; ++i) {
        prefetch_map(&p.link[i].a);
        prefetch_map(&p.link[i].b);
      }
      produce<T>(s.ring, ring, p);
    }
  } else {
    register_grow<kMany>();
    consume<T, kEpilogue>(s, ring, p);
  }
  __syncwarp();
  cluster_sync();  // a block stays until its peer's last multicast and arrivals have landed
#endif
}

// A refusal is told once: where the runtime still knew of it, cudaGetLastError would name it after the launches that
// take the place of this one.
cudaError_t told(cudaError_t error) {
  if (error) static_cast<void>(cudaGetLastError());
  return error;
}

// What the links of a chain share.
cudaError_t begin(Params& p, int64_t M, int count, int rounds_ahead, void* workspace) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major != 9) return cudaErrorNoKernelImageForDevice;
  if (count < 1 || count > kSm90Links || M > INT32_MAX - 256) return cudaErrorInvalidValue;
  if (rounds_ahead < 1 || rounds_ahead > kMostRounds) return cudaErrorInvalidValue;
  p = {};
  p.M = static_cast<int>(M);
  p.tiles_m = static_cast<int>(ceil_div(M, kCluster * kRows));
  p.links = count;
  p.rounds_ahead = rounds_ahead;
  p.finished = static_cast<int32_t*>(workspace);
  return cudaSuccess;
}

template <Epilogue kEpilogue>
cudaError_t launch(Params& p, core::DType dtype, cudaStream_t stream) {
  static_assert(sizeof(Shared) + 1023 <= 232448, "more shared memory than a Hopper block can have");
  static_assert(sizeof(Params) <= 4096, "more than a kernel's parameters may be");
  return told(dispatch(dtype, [&]<typename T>() {
    return launch_clusters(linear_sm90_kernel<T, kEpilogue>, sizeof(Shared), p, stream);
  }));
}

}  // namespace

int64_t sm90_strips(int64_t M) { return ceil_div(M, kCluster * kRows) * kCluster; }
int64_t sm90_mask_bytes(int64_t M, int64_t N) {
  return sm90_strips(M) * ceil_div(N, kColumns) * (kRows * kColumns / 8);
}
int64_t sm90_workspace(int64_t M, int links) {
  return links > 1 ? (links - 1) * sm90_strips(M) * int64_t{sizeof(int32_t)} : 0;
}

cudaError_t linear_forward_sm90(const void* x, int64_t M, int64_t K, core::DType dtype, const ForwardSm90* links,
                                int count, DropoutArgs dropout, int rounds_ahead, void* workspace,
                                cudaStream_t stream) {
  Params p;
  if (const cudaError_t error = begin(p, M, count, rounds_ahead, workspace)) return error;
  if (M == 0) return cudaSuccess;
  for (int i = 0; i < count; ++i) {
    const ForwardSm90& layer = links[i];
    Link& link = p.link[i];
    if (const cudaError_t error = set_link(p, i, x, K, layer.weight, layer.N, dtype)) return told(error);
    link.scale = dropout.threshold ? dropout.scale : 1.f;
    link.c = layer.y;
    link.bias = layer.bias;
    link.mask = layer.mask;
    x = layer.y;
    K = layer.N;
  }
  p.dropout = dropout;
  return launch<Epilogue::kForward>(p, dtype, stream);
}

cudaError_t linear_dgrad_sm90(const void* dz, int64_t M, int64_t K, core::DType dtype, const GradientSm90* links,
                              int count, float scale, float* found_inf, int rounds_ahead, void* workspace,
                              cudaStream_t stream) {
  Params p;
  if (const cudaError_t error = begin(p, M, count, rounds_ahead, workspace)) return error;
  if (M == 0) return cudaSuccess;
  p.found_inf = found_inf;
  for (int i = 0; i < count; ++i) {
    const GradientSm90& layer = links[i];
    Link& link = p.link[i];
    if (layer.column_sums && !layer.mask) return cudaErrorInvalidValue;
    if (const cudaError_t error = set_link(p, i, dz, K, layer.weight_t, layer.N, dtype)) return told(error);
    link.scale = layer.mask ? scale : 1.f;
    link.c = layer.dx;
    link.mask = const_cast<void*>(layer.mask);
    link.column_sums = layer.column_sums;
    dz = layer.dx;
    K = layer.N;
  }
  return launch<Epilogue::kGradient>(p, dtype, stream);
}

}  // namespace widedeep::kernels
