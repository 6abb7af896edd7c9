// Of the Hopper products: chains of them, the order of their tiles, and the launch. Included by gemm_sm90_ring.cuh
// alone.
#pragma once
#include "kernels/gemm_sm90.h"
#include "kernels/gemm_sm90_bits.cuh"
#include "kernels/sm90.cuh"
#include "kernels/tensor_map.h"

namespace widedeep::kernels::sm90 {

constexpr int kThreads = 3 * 128;  // more would leave a thread fewer registers than a wgmma of this size needs
constexpr int kFinishers =
    3;  // warps that finish a tile's rows, each a part; the first of their warpgroup feeds the ring

// One product of a chain: C [M, N] = A B^T. A is the C of the link before, of the first the chain's input.
struct Link {
  CUtensorMap a, b;
  int N;
  int stages;   // ceil(K / elements of a stage)
  int tiles_n;  // of 256 columns
  float scale;
  void* c;
  const void* bias;
  void* mask;
  float* column_sums;
};

// A cluster tile has 256 rows x 256 columns. The tiles are numbered band by band of rows; in a band link by link; of a
// link row by row. So what a tile reads was finished a while ago, and is still in the L2 cache.
struct Params {
  Link link[kSm90Links];
  int links, M, tiles_m;
  int band;               // rows of tiles that go through all links together
  int tiles_band, tiles;  // of a whole band, and of the launch
  int32_t* finished;      // [links - 1, 2 tiles_m]: the parts of a strip's rows that are stored
  float* found_inf;
  DropoutArgs dropout;
  int rounds_ahead;
};

enum class Epilogue { kForward, kGradient };

// Sets the shapes of link `at`, whose input has K columns.
inline cudaError_t set_link(Params& p, int at, const void* a, int64_t K, const void* b, int64_t N, core::DType dtype) {
  Link& link = p.link[at];
  if (N > INT32_MAX - 256) return cudaErrorInvalidValue;
  link.N = static_cast<int>(N);
  link.stages = static_cast<int>(ceil_div(K * core::bytes_of(dtype), kSlice));
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
  const auto wanted = static_cast<int>(ceil_div(p.rounds_ahead * clusters, fewest));
  const int bands = p.links > 1 && p.tiles_m > wanted ? p.tiles_m / wanted : 1;
  p.band = static_cast<int>(ceil_div(p.tiles_m, bands));
  p.tiles_band = p.band * all;
  p.tiles = p.tiles_m * all;
  return cudaSuccess;
}

// Clusters share the tiles, as many as the device runs at a time: links wait for each other's tiles. p has its links.
template <typename Kernel>
cudaError_t launch_clusters(Kernel kernel, size_t shared_bytes, Params& p, cudaStream_t stream) {
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  // Code for sm_90 without its "a" runs on a Hopper GPU too, but has no wgmma.
  cudaFuncAttributes code{};
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return error;
  if (code.maxThreadsPerBlock < kThreads) return cudaErrorNoKernelImageForDevice;
  const auto bytes = static_cast<int>(shared_bytes + 1023);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  int clusters = sms / kCluster;
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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

// What must be counted before the copies of a tile of `link` > 0: all parts of the strip that the block reads.
struct Needed {
  const int32_t* counter;
  int32_t parts;
};

__device__ __forceinline__ Needed needed_by(const Params& p, const Place& at) {
  const int below = at.link - 1, strip = at.m * kCluster + static_cast<int>(cluster_rank());
  return {counter_of(p, below, strip), kFinishers * p.link[below].tiles_n};
}

// Clusters that have a tile less than others lose nothing by starting later, each a little more: so not all store their
// tiles, and load the next, at the same time.
__device__ __forceinline__ void start_apart(const Params& p, int clusters) {
  const int cluster = blockIdx.x / kCluster, rest = p.tiles % clusters;
  constexpr int kStageCycles = 8 * kSlice;  // of the tensor cores
  if (p.tiles > clusters && rest > 0 && cluster >= rest)
    pause(static_cast<uint32_t>(kStageCycles * p.link[p.links - 1].stages / (clusters - rest) * (cluster - rest)));
}

#endif

}  // namespace widedeep::kernels::sm90
