// A warp takes 32 rows of the batch: each lane finds out where one of them lies, then all lanes copy them together, so
// that what is written is contiguous, and what is read are whole rows. Eight loads a lane are in flight at a time,
// since rows lie anywhere.
#include "kernels/batch.h"
#include "kernels/common.cuh"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 64;  // two warps: a small batch, too, reaches many multiprocessors
constexpr int kFlight = 8;

struct AsStored {
  __device__ uint64_t operator()(uint64_t position) const { return position; }
};

// Rows of `width` 4-byte words; lane r knows where row r lies, of `rows` in all.
__device__ __forceinline__ void copy_rows(const uint32_t* __restrict__ from, uint32_t* __restrict__ to, int width,
                                          int64_t row, int rows, int lane) {
  if (width == 0) return;
  const int row_step = 32 / width, column_step = 32 % width;
  int r = lane / width, column = lane % width;  // of the lane's next word
  for (int at = lane; at - lane < rows * width; at += 32 * kFlight) {
    uint32_t word[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      const int64_t source = __shfl_sync(0xffffffffu, row, r % 32);
      word[u] = r < rows ? from[source * width + column] : 0;
      r += row_step;
      column += column_step;
      if (column >= width) {
        column -= width;
        ++r;
      }
    }
#pragma unroll
    for (int u = 0; u < kFlight; ++u)
      if (at + 32 * u < rows * width) to[at + 32 * u] = word[u];
  }
}

template <typename Order>
__global__ void __launch_bounds__(kThreads)
    gather_batch_kernel(StoredRows from, Order order, int64_t start, int64_t B, BatchRows to) {
  const int lane = threadIdx.x % 32;
  const int64_t first = global_thread() - lane;
  if (first >= B) return;
  const int rows = B - first < 32 ? static_cast<int>(B - first) : 32;
  const int64_t row = lane < rows ? static_cast<int64_t>(order(start + first + lane)) : 0;
  if (lane < rows) {
    to.label[first + lane] = from.label[row];
    if (from.group) to.group[first + lane] = from.group[row];
  }
  const int K = static_cast<int>(from.K), N = static_cast<int>(from.N);
  copy_rows(reinterpret_cast<const uint32_t*>(from.ids), reinterpret_cast<uint32_t*>(to.ids + first * K), K, row, rows,
            lane);
  copy_rows(reinterpret_cast<const uint32_t*>(from.numeric), reinterpret_cast<uint32_t*>(to.numeric + first * N), N,
            row, rows, lane);
}

}  // namespace

cudaError_t gather_batch(const StoredRows& from, const core::EpochOrder* order, int64_t start, int64_t B,
                         const BatchRows& to, cudaStream_t stream) {
  if (B == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(ceil_div(B, kThreads));
  if (order)
    gather_batch_kernel<<<grid, kThreads, 0, stream>>>(from, *order, start, B, to);
  else
    gather_batch_kernel<<<grid, kThreads, 0, stream>>>(from, AsStored{}, start, B, to);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
