// embedding_segments: sort (flat row, position) pairs, number the distinct rows by a scan over the places where the row
// changes, and scatter. The sort is stable, so positions stay ascending within a row. Sizes depend on B and K alone: no
// host waits for a count.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "kernels/common.cuh"
#include "kernels/embedding.h"
#include "kernels/optim.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 256;

// 1 where a new valid row starts among the sorted keys; padding sorts last, as key `rows`.
struct StartsRow {
  const uint32_t* keys;
  uint32_t rows;
  __host__ __device__ int32_t operator()(int32_t i) const {
    return keys[i] < rows && (i == 0 || keys[i] != keys[i - 1]) ? 1 : 0;
  }
};

using Starts = thrust::transform_iterator<StartsRow, thrust::counting_iterator<int32_t>>;

struct Workspace {
  uint32_t* keys;
  int32_t *positions, *rank;
  void* cub;
  size_t cub_bytes;
};

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

int key_bits(int64_t rows) {
  int bits = 1;
  while (rows >> bits) ++bits;
  return bits;
}

// Counts of entries, all below 2^31, go to cub as int: its scan for 64-bit counts spills registers.
size_t cub_bytes(int64_t n, int64_t rows) {
  const int count = static_cast<int>(n);
  size_t sort = 0, scan = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, sort, static_cast<const uint32_t*>(nullptr), static_cast<uint32_t*>(nullptr),
                                  static_cast<const int32_t*>(nullptr), static_cast<int32_t*>(nullptr), count, 0,
                                  key_bits(rows));
  cub::DeviceScan::InclusiveSum(nullptr, scan, Starts(thrust::counting_iterator<int32_t>(0), StartsRow{}),
                                static_cast<int32_t*>(nullptr), count);
  return sort > scan ? sort : scan;
}

__global__ void __launch_bounds__(kThreads)
    make_keys_kernel(Batch batch, const __grid_constant__ Features features, uint32_t rows, uint32_t* __restrict__ keys,
                     int32_t* __restrict__ positions) {
  extern __shared__ int32_t base[];  // [K]
  for (int f = threadIdx.x; f < features.count; f += kThreads)
    for (int h = 0; h < features.feature[f].hotness; ++h)
      base[features.feature[f].first_id + h] = features.feature[f].row_base;
  __syncthreads();
  const int64_t n = batch.B * features.K;
  for (int64_t i = global_thread(); i < n; i += grid_threads()) {
    const int32_t id = batch.ids[i];
    keys[i] = id < 0 ? rows : static_cast<uint32_t>(base[i % features.K] + id);
    positions[i] = static_cast<int32_t>(i);
  }
}

// First sorted place whose key is not below `key`.
__device__ int64_t lower_bound(const uint32_t* keys, int64_t n, uint32_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const uint32_t* __restrict__ keys, const int32_t* __restrict__ rank, int64_t n, uint32_t rows,
                   const __grid_constant__ Features features, Segments out) {
  __shared__ int32_t valid;
  if (threadIdx.x == 0) valid = static_cast<int32_t>(lower_bound(keys, n, rows));
  __syncthreads();
  const int32_t distinct = rank[n - 1];
  for (int64_t i = global_thread(); i <= n; i += grid_threads()) {
    if (i >= distinct) {
      if (i < n) out.unique[i] = -1;
      out.offsets[i] = valid;
    }
    if (i == n) break;
    if (StartsRow{keys, rows}(static_cast<int32_t>(i))) {
      out.unique[rank[i] - 1] = static_cast<int32_t>(keys[i]);
      out.offsets[rank[i] - 1] = static_cast<int32_t>(i);
    }
    if (i >= valid) out.entries[i] = -1;
  }
  for (int64_t f = global_thread(); f <= features.count; f += grid_threads()) {
    const int64_t at = f < features.count ? lower_bound(keys, n, features.feature[f].row_base) : n;
    out.table_start[f] = at == 0 ? 0 : rank[at - 1];
  }
}

Workspace carve(void* memory, int64_t n, int64_t rows) {
  Workspace w;
  auto* at = static_cast<uint8_t*>(memory);
  const size_t array = aligned(n * 4);
  w.keys = reinterpret_cast<uint32_t*>(at);
  w.positions = reinterpret_cast<int32_t*>(at + array);
  w.rank = reinterpret_cast<int32_t*>(at + 2 * array);
  w.cub = at + 3 * array;
  w.cub_bytes = cub_bytes(n, rows);
  return w;
}

__global__ void __launch_bounds__(kThreads)
    list_rows_kernel(const int64_t* __restrict__ rows, int64_t n, int64_t R, uint32_t* __restrict__ keys,
                     int32_t* __restrict__ positions) {
  for (int64_t i = global_thread(); i < n; i += grid_threads()) {
    if (rows[i] >= R) __trap();  // past the table: stop before it is written
    keys[i] = static_cast<uint32_t>(rows[i] < 0 ? R : rows[i]);
    positions[i] = static_cast<int32_t>(i);
  }
}

}  // namespace

size_t segments_workspace(int64_t n, int64_t rows) { return 3 * aligned(n * 4) + cub_bytes(n, rows); }

cudaError_t embedding_segments(const Batch& batch, const Features& features, int64_t rows, const Segments& out,
                               void* workspace, cudaStream_t stream) {
  const int64_t n = batch.B * features.K;
  if (n == 0) {
    cudaMemsetAsync(out.offsets, 0, sizeof(int32_t), stream);
    return cudaMemsetAsync(out.table_start, 0, (features.count + 1) * sizeof(int32_t), stream);
  }
  Workspace w = carve(workspace, n, rows);
  auto* const sorted = reinterpret_cast<uint32_t*>(out.keys);
  const int count = static_cast<int>(n);
  const int grid = grid_for(n + 1, kThreads);
  make_keys_kernel<<<grid, kThreads, features.K * sizeof(int32_t), stream>>>(
      batch, features, static_cast<uint32_t>(rows), w.keys, w.positions);
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (const cudaError_t error = cub::DeviceRadixSort::SortPairs(w.cub, w.cub_bytes, w.keys, sorted, w.positions,
                                                                out.entries, count, 0, key_bits(rows), stream))
    return error;
  const Starts starts(thrust::counting_iterator<int32_t>(0), StartsRow{sorted, static_cast<uint32_t>(rows)});
  if (const cudaError_t error = cub::DeviceScan::InclusiveSum(w.cub, w.cub_bytes, starts, w.rank, count, stream))
    return error;
  // One wave of blocks, since each begins with a search.
  scatter_kernel<<<grid_for(n + 1, kThreads, 132 * 8), kThreads, 0, stream>>>(
      sorted, w.rank, n, static_cast<uint32_t>(rows), features, out);
  return cudaGetLastError();
}

size_t sort_rows_workspace(int64_t n, int64_t R) { return segments_workspace(n, R); }

cudaError_t sort_rows(const int64_t* rows, int64_t n, int64_t R, uint32_t* sorted, int32_t* order, void* workspace,
                      cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  Workspace w = carve(workspace, n, R);
  list_rows_kernel<<<grid_for(n, kThreads), kThreads, 0, stream>>>(rows, n, R, w.keys, w.positions);
  if (const cudaError_t error = cudaGetLastError()) return error;
  return cub::DeviceRadixSort::SortPairs(w.cub, w.cub_bytes, w.keys, sorted, w.positions, order, static_cast<int>(n), 0,
                                         key_bits(R), stream);
}

}  // namespace widedeep::kernels
