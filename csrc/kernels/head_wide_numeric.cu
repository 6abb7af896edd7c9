// A block takes every kBlocks-th group of rows; a thread owns a column of every kBlocks-th of those, neighbours read
// neighbours, and one column more than there are, of ones, makes the bias. The block's rows are added in shared memory,
// the blocks by a second kernel, in order.
#include "kernels/common.cuh"
#include "kernels/head.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 512;  // one row of kMaxWideNumeric columns and the bias at least
constexpr int kBlocks = 264;   // fixed, so that the order of the sums is too
constexpr int kJoinWarps = 8;
static_assert(kMaxWideNumeric < kThreads);

__global__ void __launch_bounds__(kThreads)
    wide_numeric_kernel(const float* __restrict__ numeric, const float* __restrict__ dlogit, int64_t B, int N,
                        float* __restrict__ partials) {
  __shared__ float parts[kThreads];
  const int columns = N + 1, rows = kThreads / columns;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns;
  float total = 0.f;
  if (row < rows) {
#pragma unroll 4
    for (int64_t b = int64_t{blockIdx.x} * rows + row; b < B; b += int64_t{kBlocks} * rows)
      total = fmaf(dlogit[b], column < N ? numeric[b * N + column] : 1.f, total);
  }
  parts[threadIdx.x] = total;
  __syncthreads();
  if (row > 0) return;
  total = 0.f;
  for (int r = 0; r < rows; ++r) total += parts[r * columns + column];
  partials[column * kBlocks + blockIdx.x] = total;
}

// A warp adds the partials [kBlocks] of a column.
__global__ void __launch_bounds__(kJoinWarps * 32)
    wide_numeric_join_kernel(const float* __restrict__ partials, int N, float* __restrict__ dweight,
                             float* __restrict__ dbias) {
  const int column = blockIdx.x * kJoinWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (column > N) return;
  float total = 0.f;
#pragma unroll
  for (int first = 0; first < kBlocks; first += 32)
    if (const int block = first + lane; block < kBlocks) total += partials[column * kBlocks + block];
  total = warp_sum(total);
  if (lane == 0) *(column < N ? dweight + column : dbias) = total;
}

}  // namespace

size_t wide_numeric_workspace(int64_t N) { return (N + 1) * kBlocks * sizeof(float); }

// B == 0 still writes zeros.
cudaError_t wide_numeric_backward(const float* numeric, const float* dlogit, int64_t B, int64_t N, float* dweight,
                                  float* dbias, void* workspace, cudaStream_t stream) {
  if (N > kMaxWideNumeric) return cudaErrorInvalidValue;
  auto* const partials = static_cast<float*>(workspace);
  const int columns = static_cast<int>(N) + 1;
  wide_numeric_kernel<<<kBlocks, kThreads, 0, stream>>>(numeric, dlogit, B, columns - 1, partials);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const auto grid = static_cast<unsigned>(ceil_div(columns, kJoinWarps));
  wide_numeric_join_kernel<<<grid, kJoinWarps * 32, 0, stream>>>(partials, columns - 1, dweight, dbias);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
