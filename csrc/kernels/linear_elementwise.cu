// bias_relu_dropout: a thread owns 32 columns of one row, what four Philox calls serve. mask_and_sum: a block owns a
// strip of 128 rows, a thread 8 columns of every fourth row of it; the four partial sums meet in shared memory.
#include "core/philox.h"
#include "kernels/common.cuh"
#include "kernels/linear_elementwise.h"

namespace widedeep::kernels {
namespace {

constexpr int kStripRows = 128;
constexpr int kColumnThreads = 64, kRowThreads = 4;  // of a block of mask_and_sum
constexpr int kVector = 8;

template <typename T>
__global__ void __launch_bounds__(256)
    bias_relu_dropout_kernel(T* __restrict__ y, const T* __restrict__ bias, int64_t M, int64_t N, DropoutArgs args) {
  const uint64_t step = args.threshold ? static_cast<uint64_t>(*args.step) : 0;
  const core::Dropout drop{static_cast<uint32_t>(args.seed),
                           static_cast<uint32_t>(args.seed >> 32),
                           static_cast<uint32_t>(step),
                           static_cast<uint32_t>(step >> 32),
                           args.layer << 24,
                           args.threshold,
                           args.scale};
  const float scale = args.threshold ? args.scale : 1.f;
  const int64_t groups = (N + 31) / 32;
  const bool packed = N % kVector == 0;
  for (int64_t i = global_thread(); i < M * groups; i += grid_threads()) {
    const int64_t row = i / groups, group = i % groups;
    const uint32_t keep = args.threshold ? core::dropout_keep32(drop, static_cast<uint32_t>(args.first_row + row),
                                                                static_cast<uint32_t>(group))
                                         : 0xFFFFFFFFu;
#pragma unroll
    for (int part = 0; part < 32 / kVector; ++part) {
      const int64_t column = group * 32 + part * kVector;
      if (column >= N) break;
      Pack<T, kVector> v = load8(y + row * N + column, N - column, packed);
      const Pack<T, kVector> offset = bias ? load8(bias + column, N - column, packed) : Pack<T, kVector>{};
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float z = to_float(v.v[e]) + to_float(offset.v[e]);
        v.v[e] = from_float<T>(z < 0.f || !(keep >> (part * kVector + e) & 1) ? 0.f : z * scale);
      }
      store8(y + row * N + column, v, N - column, packed);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    mask_and_sum_kernel(const T* in, const T* __restrict__ mask, float scale, T* out, float* __restrict__ sums,
                        int64_t M, int64_t N) {
  __shared__ float parts[kRowThreads][kColumnThreads * kVector];
  const int64_t column = (int64_t{blockIdx.x} * kColumnThreads + threadIdx.x) * kVector;
  const int64_t first = int64_t{blockIdx.y} * kStripRows;
  const int64_t last = first + kStripRows < M ? first + kStripRows : M;
  const bool packed = N % kVector == 0;
  float total[kVector] = {};
  if (column < N) {
#pragma unroll 2
    for (int64_t row = first + threadIdx.y; row < last; row += kRowThreads) {
      Pack<T, kVector> v = load8(in + row * N + column, N - column, packed), m{};
      if (mask) m = load8(mask + row * N + column, N - column, packed);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float kept = !mask || to_float(m.v[e]) > 0.f ? to_float(v.v[e]) * scale : 0.f;
        total[e] += kept;
        v.v[e] = from_float<T>(kept);
      }
      store8(out + row * N + column, v, N - column, packed);
    }
  }
  if (!sums) return;
#pragma unroll
  for (int e = 0; e < kVector; ++e) parts[threadIdx.y][threadIdx.x * kVector + e] = total[e];
  __syncthreads();
  for (int i = threadIdx.y * kColumnThreads + threadIdx.x; i < kColumnThreads * kVector;
       i += kColumnThreads * kRowThreads) {
    const int64_t at = int64_t{blockIdx.x} * kColumnThreads * kVector + i;
    if (at < N) sums[blockIdx.y * N + at] = (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]);
  }
}

// 32 columns a block; each of 32 thread rows adds every 32nd strip, then the rows are added in order.
__global__ void __launch_bounds__(1024)
    add_strips_kernel(const float* __restrict__ sums, float* __restrict__ out, int64_t strips, int64_t N) {
  __shared__ float parts[32][33];
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float total = 0.f;
  if (column < N) {
#pragma unroll 8
    for (int64_t strip = threadIdx.y; strip < strips; strip += 32) total += sums[strip * N + column];
  }
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < N) {
    float all = 0.f;
#pragma unroll
    for (int row = 0; row < 32; ++row) all += parts[row][threadIdx.x];
    out[column] = all;
  }
}

template <typename T>
cudaError_t launch_mask(const void* in, const void* mask, float scale, void* out, float* sums, int64_t M, int64_t N,
                        cudaStream_t stream) {
  const int64_t strips = mask_strips(M);
  if (strips > 65535) return cudaErrorInvalidValue;  // 8.3 million rows: past any batch that fits a GPU
  const dim3 grid(static_cast<unsigned>(ceil_div(N, kColumnThreads * kVector)), static_cast<unsigned>(strips));
  mask_and_sum_kernel<T><<<grid, dim3(kColumnThreads, kRowThreads), 0, stream>>>(
      static_cast<const T*>(in), static_cast<const T*>(mask), scale, static_cast<T*>(out), sums, M, N);
  return cudaGetLastError();
}

}  // namespace

cudaError_t bias_relu_dropout(void* y, const void* bias, int64_t M, int64_t N, core::DType dtype, DropoutArgs dropout,
                              cudaStream_t stream) {
  if (M == 0 || N == 0) return cudaSuccess;
  const int grid = grid_for(M * ceil_div(N, 32), 256);
  switch (dtype) {
    case core::DType::f32:
      bias_relu_dropout_kernel<<<grid, 256, 0, stream>>>(static_cast<float*>(y), static_cast<const float*>(bias), M, N,
                                                         dropout);
      break;
    case core::DType::f16:
      bias_relu_dropout_kernel<<<grid, 256, 0, stream>>>(static_cast<__half*>(y), static_cast<const __half*>(bias), M,
                                                         N, dropout);
      break;
    case core::DType::bf16:
      bias_relu_dropout_kernel<<<grid, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(y),
                                                         static_cast<const __nv_bfloat16*>(bias), M, N, dropout);
      break;
  }
  return cudaGetLastError();
}

int64_t mask_strips(int64_t M) { return ceil_div(M, kStripRows); }

cudaError_t mask_and_sum(const void* in, const void* mask, float scale, void* out, float* sums, int64_t M, int64_t N,
                         core::DType dtype, cudaStream_t stream) {
  if (M == 0 || N == 0) return cudaSuccess;
  switch (dtype) {
    case core::DType::f32:
      return launch_mask<float>(in, mask, scale, out, sums, M, N, stream);
    case core::DType::f16:
      return launch_mask<__half>(in, mask, scale, out, sums, M, N, stream);
    default:
      return launch_mask<__nv_bfloat16>(in, mask, scale, out, sums, M, N, stream);
  }
}

cudaError_t add_strips(const float* sums, float* out, int64_t strips, int64_t N, cudaStream_t stream) {
  if (N == 0) return cudaSuccess;
  add_strips_kernel<<<static_cast<unsigned>(ceil_div(N, 32)), dim3(32, 32), 0, stream>>>(sums, out, strips, N);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
