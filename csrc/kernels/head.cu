// A warp owns a row: lane l holds the columns 8 (32 v + l) .. + 7. Each warp walks every (grid's warps)-th row and
// keeps its sums of dz and of dlogit h in registers; the block's warps are added in shared memory, the blocks by a
// second kernel, in order.
#include "core/logistic.h"
#include "kernels/common.cuh"
#include "kernels/head.h"

namespace widedeep::kernels {
namespace {

constexpr int kWarps = 6;  // two blocks an SM then leave 170 registers a thread: enough for 1024 columns
constexpr int kThreads = kWarps * 32;
constexpr int kBlocks = 264;  // two for each SM of a Hopper GPU; fixed, so that the order of the sums is too

template <typename T, int kVectors>
struct Row {
  Pack<T, 8> part[kVectors];

  __device__ __forceinline__ void load(const T* row, int lane, int64_t H) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * 32 + lane) * 8;
      part[v] = load8(row + column, H - column, kVectors > 4 || H % 8 == 0);
    }
  }

  // Wide rows are read again (from the L1 cache) rather than kept: registers hold two sums as long as they are.
  __device__ __forceinline__ Pack<T, 8> again(int v, const T* row, int lane, int64_t H) const {
    if constexpr (kVectors <= 4) return part[v];
    const int column = (v * 32 + lane) * 8;
    return load8(row + column, H - column, kVectors > 4 || H % 8 == 0);
  }
};

// The weights lie in shared memory: in registers, beside two sums of the same size, they would halve the warps in
// flight.
template <int kVectors>
__device__ __forceinline__ void load_weights(float* shared, const float* weight, int64_t H) {
  for (int column = threadIdx.x; column < kVectors * 256; column += kThreads)
    shared[column] = column < H ? weight[column] : 0.f;
  __syncthreads();
}

__device__ __forceinline__ Pack<float, 8> weights_at(const float* shared, int v, int lane) {
  return *reinterpret_cast<const Pack<float, 8>*>(shared + (v * 32 + lane) * 8);
}

template <typename T, int kVectors>
__device__ __forceinline__ float dot(const Row<T, kVectors>& row, const float* weights, int lane) {
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const Pack<float, 8> w = weights_at(weights, v, lane);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = fmaf(to_float(row.part[v].v[e]), w.v[e], sum);
  }
  return warp_sum(sum);
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads) head_forward_kernel(HeadInputs in, float* __restrict__ logit) {
  __shared__ alignas(32) float weights[kVectors * 256];
  const int lane = threadIdx.x % 32;
  load_weights<kVectors>(weights, in.weight, in.H);
  for (int64_t b = global_thread() / 32; b < in.B; b += grid_threads() / 32) {
    Row<T, kVectors> row;
    row.load(static_cast<const T*>(in.h) + b * in.H, lane, in.H);
    const float sum = dot(row, weights, lane);
    if (lane == 0) logit[b] = sum + *in.bias + in.wide_logit[b];
  }
}

// The block's warps add their [H] sums; the result goes to partial [2 H + 2] of this block at `offset`.
template <int kVectors>
__device__ void add_warps(float (*shared)[kVectors * 256], const float (&sum)[kVectors][8], float* partial, int64_t H) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int e = 0; e < 8; ++e) shared[warp][(v * 32 + lane) * 8 + e] = sum[v][e];
  __syncthreads();
  for (int column = threadIdx.x; column < H; column += kThreads) {
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += shared[w][column];
    partial[column] = total;
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads)
    head_step_kernel(HeadInputs in, HeadStep out, float* __restrict__ partials) {
  extern __shared__ float memory[];  // [kWarps][kVectors * 256]
  __shared__ alignas(32) float weights[kVectors * 256];
  __shared__ float scalars[2][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = (out.loss_scale ? *out.loss_scale : 1.f) / out.global_rows;
  float dweight[kVectors][8] = {}, dbias_hidden[kVectors][8] = {}, dbias = 0.f, loss = 0.f;
  load_weights<kVectors>(weights, in.weight, in.H);
  for (int64_t b = global_thread() / 32; b < in.B; b += grid_threads() / 32) {
    const T* const h_row = static_cast<const T*>(in.h) + b * in.H;
    Row<T, kVectors> row;
    row.load(h_row, lane, in.H);
    const float z = dot(row, weights, lane) + *in.bias + in.wide_logit[b], y = out.label[b];
    const float dlogit = (core::sigmoid(z) - y) * scale;
    if (lane == 0) {
      out.logit[b] = z;
      out.dlogit[b] = dlogit;
    }
    dbias += dlogit;
    loss += core::bce_with_logits(z, y);
    T* const dz = static_cast<T*>(out.dz) + b * in.H;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Pack<float, 8> w = weights_at(weights, v, lane);
      const Pack<T, 8> part = row.again(v, h_row, lane, in.H);
      Pack<T, 8> stored;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float h = to_float(part.v[e]);
        const float g = h > 0.f ? dlogit * w.v[e] * out.kept_scale : 0.f;
        dweight[v][e] = fmaf(dlogit, h, dweight[v][e]);
        dbias_hidden[v][e] += g;
        stored.v[e] = from_float<T>(g);
      }
      const int column = (v * 32 + lane) * 8;
      store8(dz + column, stored, in.H - column, kVectors > 4 || in.H % 8 == 0);
    }
  }
  auto* shared = reinterpret_cast<float (*)[kVectors * 256]>(memory);
  float* const partial = partials + blockIdx.x * (2 * in.H + 2);
  add_warps<kVectors>(shared, dbias_hidden, partial, in.H);
  add_warps<kVectors>(shared, dweight, partial + in.H, in.H);
  if (lane == 0) scalars[0][warp] = dbias, scalars[1][warp] = loss;
  __syncthreads();
  if (threadIdx.x < 2) {
    float total = 0.f;
    for (int i = 0; i < kWarps; ++i) total += scalars[threadIdx.x][i];
    partial[2 * in.H + threadIdx.x] = total;
  }
}

// Adds the blocks' partials [kBlocks][2 H + 2]: 32 columns a block, 32 strided sums a column, then those in order.
__global__ void __launch_bounds__(1024) head_join_kernel(const float* __restrict__ partials, int64_t H, HeadStep out) {
  __shared__ float parts[32][33];
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x, columns = 2 * H + 2;
  float total = 0.f;
  if (column < columns)
    for (int block = threadIdx.y; block < kBlocks; block += 32) total += partials[block * columns + column];
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  total = 0.f;
  for (int row = 0; row < 32; ++row) total += parts[row][threadIdx.x];
  if (column < H)
    out.dbias_hidden[column] = total;
  else if (column < 2 * H)
    out.dweight[column - H] = total;
  else if (column == 2 * H)
    *out.dbias = total;
  else
    *out.loss = total / out.global_rows;
}

template <typename T, int kVectors>
cudaError_t launch_step(const HeadInputs& in, const HeadStep& out, float* partials, cudaStream_t stream) {
  auto* kernel = head_step_kernel<T, kVectors>;
  constexpr int kBytes = kWarps * kVectors * 256 * sizeof(float);
  if (kVectors > 4) {  // with the static weights more than the 48 KB that a launch may have unasked
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<kBlocks, kThreads, kBytes, stream>>>(in, out, partials);
  if (const cudaError_t error = cudaGetLastError()) return error;
  head_join_kernel<<<static_cast<unsigned>(ceil_div(2 * in.H + 2, 32)), dim3(32, 32), 0, stream>>>(partials, in.H, out);
  return cudaGetLastError();
}

template <typename T, int kVectors>
cudaError_t launch_forward(const HeadInputs& in, float* logit, cudaStream_t stream) {
  const int grid = grid_for(in.B * 32, kThreads, kBlocks * 2);
  head_forward_kernel<T, kVectors><<<grid, kThreads, 0, stream>>>(in, logit);
  return cudaGetLastError();
}

// Calls f.template operator()<T, kVectors>() for the dtype and the fewest vectors that hold a row.
template <typename F>
cudaError_t dispatch(const HeadInputs& in, F f) {
  if (in.H > kMaxHead || (in.H > kMaxRagged && in.H % 8 != 0)) return cudaErrorInvalidValue;
  const auto by_width = [&]<typename T>() {
    return in.H <= 256    ? f.template operator()<T, 1>()
           : in.H <= 512  ? f.template operator()<T, 2>()
           : in.H <= 1024 ? f.template operator()<T, 4>()
                          : f.template operator()<T, 8>();
  };
  switch (in.type) {
    case core::DType::f32:
      return by_width.template operator()<float>();
    case core::DType::f16:
      return by_width.template operator()<__half>();
    default:
      return by_width.template operator()<__nv_bfloat16>();
  }
}

}  // namespace

cudaError_t head_forward(const HeadInputs& in, float* logit, cudaStream_t stream) {
  if (in.B == 0) return cudaSuccess;
  return dispatch(in, [&]<typename T, int kVectors>() { return launch_forward<T, kVectors>(in, logit, stream); });
}

size_t head_workspace(int64_t H) { return kBlocks * (2 * H + 2) * sizeof(float); }

// B == 0 still writes zeros to every sum.
cudaError_t head_step(const HeadInputs& in, const HeadStep& out, void* workspace, cudaStream_t stream) {
  auto* partials = static_cast<float*>(workspace);
  return dispatch(in, [&]<typename T, int kVectors>() { return launch_step<T, kVectors>(in, out, partials, stream); });
}

}  // namespace widedeep::kernels
