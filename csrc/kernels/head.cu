// A warp owns a row: lane l holds the columns 8 (32 v + l) .. + 7. Each warp walks the rows with the grid's stride, one
// or two at a turn, and keeps its sums of dz and of dlogit h in registers; the block's warps are added in shared
// memory, the blocks by a second kernel, in order.
#include "core/logistic.h"
#include "kernels/common.cuh"
#include "kernels/head.h"
#include "kernels/head_rows.cuh"

namespace widedeep::kernels {

using namespace head_rows;

namespace {

constexpr int kWarps = 6;  // two blocks an SM then leave 168 registers a thread: enough for 1024 columns
constexpr int kThreads = kWarps * 32;
constexpr int kBlocks = 264;  // two for each SM of a Hopper GPU; fixed, so that the order of the sums is too

using Floats8 = Pack<float, 8>;

// The weights lie in shared memory, behind them the bias and the scale of the gradients: in registers, beside two sums
// of the same size, they would halve the warps in flight.
template <int kVectors>
__device__ __forceinline__ void load_weights(float* shared, const HeadInputs& in, float scale = 1.f) {
  for (int column = threadIdx.x; column < kVectors * 256; column += kThreads)
    shared[column] = column < in.H ? in.weight[column] : 0.f;
  if (threadIdx.x == 0) shared[kVectors * 256] = *in.bias, shared[kVectors * 256 + 1] = scale;
  __syncthreads();
}

__device__ __forceinline__ Floats8 weights_at(const float* shared, int v, int lane) {
  return *reinterpret_cast<const Floats8*>(shared + (v * 32 + lane) * 8);
}

// The rows' products with the weights, in every lane.
template <typename T, int kVectors>
__device__ __forceinline__ void dot(const Turn<T, kVectors>& turn, const float* weights, int lane,
                                    float (&sum)[kRows<kVectors>]) {
#pragma unroll
  for (int r = 0; r < kRows<kVectors>; ++r) sum[r] = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const Floats8 w = weights_at(weights, v, lane);
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r)
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[r] = fmaf(turn.part[r][v][e], w.v[e], sum[r]);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], distance);
}

// Blocks an SM of the forward pass: a row at a turn and the next under way, as many as their registers allow.
template <typename T, int kVectors>
constexpr int kForwardBlocks = sizeof(T) == 2 ? 4 : 3;

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kVectors>)
    head_forward_kernel(HeadInputs in, float* __restrict__ logit) {
  __shared__ alignas(16) float weights[kVectors * 256 + 2];
  const int lane = threadIdx.x % 32;
  load_weights<kVectors>(weights, in);
  walk<T, kVectors>(in, nullptr, lane, [&](const Turn<T, kVectors>& turn) {
    float sum[kRows<kVectors>];
    dot(turn, weights, lane, sum);
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r)
      if (lane == 0 && turn.real(r, in.B))
        logit[turn.first + r] = sum[r] + weights[kVectors * 256] + turn.wide_logit[r];
  });
}

// The block's warps add their [H] sums; the result goes to `partial` [H].
template <int kVectors>
__device__ void add_warps(Floats8 (*shared)[kVectors * 32], const Floats8 (&sum)[kVectors], float* partial, int64_t H) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) shared[warp][v * 32 + lane] = sum[v];
  __syncthreads();
  for (int column = threadIdx.x; column < H; column += kThreads) {
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += shared[w][column / 8].v[column % 8];
    partial[column] = total;
  }
}

// dz of a turn's rows, and their share of the sums over the batch.
template <typename T, int kVectors>
__device__ __forceinline__ void backward(const Turn<T, kVectors>& turn, const float (&dlogit)[kRows<kVectors>],
                                         const HeadInputs& in, const HeadStep& out, const float* weights, int lane,
                                         Floats8 (&dweight)[kVectors], Floats8 (&dbias_hidden)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const Floats8 w = weights_at(weights, v, lane);
    const int column = (v * 32 + lane) * 8;
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r) {
      const int64_t at = (turn.first + r) * in.H;
      Words<T> part = turn.part[r][v];
      if constexpr (!kKept<kVectors>)
        part = std::bit_cast<Words<T>>(load8(static_cast<const T*>(in.h) + at + column, in.H - column, true));
      Pack<T, 8> dz;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float h = part[e];
        const float g = h > 0.f ? dlogit[r] * w.v[e] * out.kept_scale : 0.f;
        dweight[v].v[e] = fmaf(dlogit[r], h, dweight[v].v[e]);
        dbias_hidden[v].v[e] += g;
        dz.v[e] = from_float<T>(g);
      }
      if (turn.real(r, in.B))
        store8(static_cast<T*>(out.dz) + at + column, dz, in.H - column, !kKept<kVectors> || in.H % 8 == 0);
    }
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    head_step_kernel(HeadInputs in, HeadStep out, float* __restrict__ partials) {
  extern __shared__ Floats8 memory[];  // [kWarps][kVectors * 32]
  __shared__ alignas(16) float weights[kVectors * 256 + 2];
  __shared__ float scalars[2][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Floats8 dweight[kVectors] = {}, dbias_hidden[kVectors] = {};
  if (lane == 0) scalars[0][warp] = scalars[1][warp] = 0.f;  // dbias and loss
  load_weights<kVectors>(weights, in, (out.loss_scale ? *out.loss_scale : 1.f) / out.global_rows);
  walk<T, kVectors>(in, out.label, lane, [&](const Turn<T, kVectors>& turn) {
    float z[kRows<kVectors>], dlogit[kRows<kVectors>];
    dot(turn, weights, lane, z);
#pragma unroll
    for (int r = 0; r < kRows<kVectors>; ++r) {
      const bool real = turn.real(r, in.B);
      z[r] += weights[kVectors * 256] + turn.wide_logit[r];
      dlogit[r] = real ? (core::sigmoid(z[r]) - turn.label[r]) * weights[kVectors * 256 + 1] : 0.f;
      if (lane == 0 && real) {
        out.logit[turn.first + r] = z[r];
        out.dlogit[turn.first + r] = dlogit[r];
        scalars[0][warp] += dlogit[r];
        scalars[1][warp] += core::bce_with_logits(z[r], turn.label[r]);
      }
    }
    backward(turn, dlogit, in, out, weights, lane, dweight, dbias_hidden);
  });
  auto* shared = reinterpret_cast<Floats8(*)[kVectors * 32]>(memory);
  float* const partial = partials + blockIdx.x * (2 * in.H + 2);
  add_warps<kVectors>(shared, dbias_hidden, partial, in.H);
  add_warps<kVectors>(shared, dweight, partial + in.H, in.H);
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
  if (column < columns) {
#pragma unroll
    for (int first = 0; first < kBlocks; first += 32)
      if (const int block = first + threadIdx.y; block < kBlocks) total += partials[block * columns + column];
  }
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
  const int grid = grid_for(in.B * 32, kThreads, kBlocks / 2 * kForwardBlocks<T, kVectors>);
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
