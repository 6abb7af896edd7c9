// bias_relu_dropout: four neighbouring threads share 32 columns of one row, what four Philox calls serve; each makes
// one call, and they exchange the bits. mask_and_sum: a block owns a strip of 128 rows, a thread columns of every
// fourth row of it; the four partial sums meet in shared memory. Every access of a warp is to whole sectors: a thread
// owns 16 bytes at a time, beside those of its neighbours.
#include "core/bits.h"
#include "core/philox.h"
#include "kernels/common.cuh"
#include "kernels/linear_elementwise.h"

namespace widedeep::kernels {
namespace {

constexpr int kStripRows = 128;
constexpr int kColumnThreads = 64, kRowThreads = 4;  // of a block of mask_and_sum
constexpr int kOwned = 8;                            // columns of a thread, in either kernel
constexpr int kBlockColumns = kColumnThreads * kOwned;
template <typename T>
constexpr int kVector = 16 / sizeof(T);  // columns of an access

// The columns of a quad of threads: access a of thread `part` begins at (a * 4 + part) * kVector.
template <typename T>
__device__ __forceinline__ uint32_t finish_quad(T* y, const T* bias, int64_t left, int part, bool packed,
                                                const core::Dropout& drop, uint32_t row, uint32_t group) {
  constexpr int kSize = kVector<T>, kCount = kOwned / kSize;
  Pack<T, kSize> value[kCount], offset[kCount] = {};
#pragma unroll
  for (int a = 0; a < kCount; ++a) {
    const int at = (a * 4 + part) * kSize;
    value[a] = load_pack<kSize>(y + at, left - at, packed);
    if (bias) offset[a] = load_pack<kSize>(bias + at, left - at, packed);
  }
  uint32_t keep = 0xFFFFFFFFu;
  if (drop.threshold) {  // the same for all threads
    keep = core::dropout_keep8(drop, row, group * 4 + part) << part * 8;
    keep |= __shfl_xor_sync(0xffffffffu, keep, 1);
    keep |= __shfl_xor_sync(0xffffffffu, keep, 2);
  }
  uint32_t positive = 0;
#pragma unroll
  for (int a = 0; a < kCount; ++a) {
    const int at = (a * 4 + part) * kSize;
    const uint32_t kept = keep >> at;
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float z = to_float(value[a].v[e]) + to_float(offset[a].v[e]);
      value[a].v[e] = from_float<T>(z < 0.f || !(kept >> e & 1) ? 0.f : z * drop.scale);
      bits |= static_cast<uint32_t>(to_float(value[a].v[e]) > 0.f) << e;
    }
    positive |= bits << at;
    store_pack(y + at, value[a], left - at, packed);
  }
  return positive;
}

template <typename T>
__global__ void __launch_bounds__(256)
    bias_relu_dropout_kernel(T* __restrict__ y, const T* __restrict__ bias, uint32_t* __restrict__ bits, int64_t M,
                             int64_t N, DropoutArgs args) {
  const uint64_t step = args.threshold ? static_cast<uint64_t>(*args.step) : 0;
  const core::Dropout drop = dropout_of(args, step, 0);
  const int64_t groups = (N + 31) / 32, quads = M * groups, stride = grid_threads() / 4;
  const int64_t row_step = stride / groups, group_step = stride % groups;
  const bool packed = N % kVector<T> == 0;
  const int part = threadIdx.x % 4;
  int64_t quad = global_thread() / 4, row = quad / groups, group = quad % groups;
  // A warp's quads stay together to the end, since all of its threads exchange bits.
  for (int64_t first = quad - threadIdx.x % 32 / 4; first < quads; first += stride, quad += stride) {
    const bool inside = quad < quads;
    const int64_t column = group * 32, at = inside ? row * N + column : 0;
    uint32_t positive =
        finish_quad(y + at, bias ? bias + (inside ? column : 0) : nullptr, inside ? N - column : 0, part, packed, drop,
                    args.first_row + static_cast<uint32_t>(row), static_cast<uint32_t>(group));
    if (bits) {
      positive |= __shfl_xor_sync(0xffffffffu, positive, 1);
      positive |= __shfl_xor_sync(0xffffffffu, positive, 2);
      if (part == 0 && inside) bits[quad] = positive;
    }
    row += row_step, group += group_step;
    if (group >= groups) group -= groups, ++row;
  }
}

// Of the `kVector` columns from `column` on, bit by bit.
template <typename T>
__device__ __forceinline__ uint32_t kept_columns(const Mask& mask, int64_t row, int64_t column, int64_t N,
                                                 bool packed) {
  if (mask.bits) {
    const int64_t byte = row * core::bit_row_bytes(N) + column / 8;
    return column < N ? uint32_t{mask.bits[byte]} >> column % 8 : 0;
  }
  if (!mask.values) return 0xFFu;
  const T* const at = static_cast<const T*>(mask.values) + row * N + column;
  const Pack<T, kVector<T>> values = load_pack<kVector<T>>(at, N - column, packed);
  uint32_t kept = 0;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) kept |= static_cast<uint32_t>(to_float(values.v[e]) > 0.f) << e;
  return kept;
}

template <typename T>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads, 4)
    mask_and_sum_kernel(const T* in, Mask mask, float scale, T* out, float* __restrict__ sums, int64_t M, int64_t N) {
  constexpr int kSize = kVector<T>, kCount = kOwned / kSize, kRows = 2 / kCount;
  __shared__ float parts[kRowThreads][kBlockColumns];
  const int64_t first_column = int64_t{blockIdx.x} * kBlockColumns;
  const int64_t first = int64_t{blockIdx.y} * kStripRows;
  const int64_t last = first + kStripRows < M ? first + kStripRows : M;
  const bool packed = N % kSize == 0;
  float total[kCount][kSize] = {};
#pragma unroll kRows
  for (int64_t row = first + threadIdx.y; row < last; row += kRowThreads) {
#pragma unroll
    for (int a = 0; a < kCount; ++a) {
      const int64_t column = first_column + (a * kColumnThreads + threadIdx.x) * kSize;
      Pack<T, kSize> v = load_pack<kSize>(in + row * N + column, N - column, packed);
      const uint32_t kept = kept_columns<T>(mask, row, column, N, packed);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float value = kept >> e & 1 ? to_float(v.v[e]) * scale : 0.f;
        total[a][e] += value;
        v.v[e] = from_float<T>(value);
      }
      store_pack(out + row * N + column, v, N - column, packed);
    }
  }
  if (!sums) return;
#pragma unroll
  for (int a = 0; a < kCount; ++a)
#pragma unroll
    for (int e = 0; e < kSize; ++e) parts[threadIdx.y][(a * kColumnThreads + threadIdx.x) * kSize + e] = total[a][e];
  __syncthreads();
  for (int i = threadIdx.y * kColumnThreads + threadIdx.x; i < kBlockColumns; i += kColumnThreads * kRowThreads) {
    const int64_t at = first_column + i;
    if (at < N) sums[blockIdx.y * N + at] = (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]);
  }
}

struct StripSumsList {
  StripSums item[kStripSums];
};

// 32 columns a block; each of 32 thread rows adds every 32nd strip, then the rows are added in order.
__global__ void __launch_bounds__(1024) add_strips_kernel(const __grid_constant__ StripSumsList list, int64_t strips) {
  __shared__ float parts[32][33];
  const float* __restrict__ const sums = list.item[blockIdx.y].sums;
  const int64_t N = list.item[blockIdx.y].N;
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
    list.item[blockIdx.y].out[column] = all;
  }
}

template <typename T>
cudaError_t launch_mask(const void* in, const Mask& mask, float scale, void* out, float* sums, int64_t M, int64_t N,
                        cudaStream_t stream) {
  const int64_t strips = mask_strips(M);
  if (strips > 65535) return cudaErrorInvalidValue;  // 8.3 million rows: past any batch that fits a GPU
  const dim3 grid(static_cast<unsigned>(ceil_div(N, kBlockColumns)), static_cast<unsigned>(strips));
  mask_and_sum_kernel<T><<<grid, dim3(kColumnThreads, kRowThreads), 0, stream>>>(static_cast<const T*>(in), mask, scale,
                                                                                 static_cast<T*>(out), sums, M, N);
  return cudaGetLastError();
}

}  // namespace

cudaError_t bias_relu_dropout(void* y, const void* bias, uint32_t* bits, int64_t M, int64_t N, core::DType dtype,
                              DropoutArgs dropout, cudaStream_t stream) {
  if (M == 0 || N == 0) return cudaSuccess;
  const auto launch = [&]<typename T>(T* values) {
    const int grid = grid_for(M * ceil_div(N, 32) * 4, 256);
    bias_relu_dropout_kernel<T><<<grid, 256, 0, stream>>>(values, static_cast<const T*>(bias), bits, M, N, dropout);
    return cudaGetLastError();
  };
  switch (dtype) {
    case core::DType::f32:
      return launch(static_cast<float*>(y));
    case core::DType::f16:
      return launch(static_cast<__half*>(y));
    default:
      return launch(static_cast<__nv_bfloat16*>(y));
  }
}

int64_t mask_strips(int64_t M) { return ceil_div(M, kStripRows); }

cudaError_t mask_and_sum(const void* in, const Mask& mask, float scale, void* out, float* sums, int64_t M, int64_t N,
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

cudaError_t add_strips(const StripSums* list, int count, int64_t strips, cudaStream_t stream) {
  if (count > kStripSums) return cudaErrorInvalidValue;
  StripSumsList items{};
  int64_t widest = 0;
  for (int i = 0; i < count; ++i) {
    items.item[i] = list[i];
    widest = list[i].N > widest ? list[i].N : widest;
  }
  if (widest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(widest, 32)), static_cast<unsigned>(count));
  add_strips_kernel<<<grid, dim3(32, 32), 0, stream>>>(items, strips);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
