// A thread owns two neighbouring columns of the deep input and walks down 32 rows: what the columns hold is found once,
// and the loads of several rows are in flight together. A warp then sums the wide logit of each row.
#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kBlockRows = 32;

// What one column of the deep input holds: element `offset` of a table's row, a numeric, or nothing.
struct Column {
  const float* values;        // the table moved to the element, or the numerics moved to theirs; null: zeros
  int32_t stride;             // dim, or N for a numeric
  int32_t first_id, hotness;  // hotness 0: a numeric
  bool mean;
};

__device__ Column find_column(const Features& features, const Numerics& numerics, const float* numeric,
                              int64_t column) {
  for (int f = 0; f < features.count; ++f) {
    const Feature& t = features.feature[f];
    if (column >= t.column && column < t.column + t.dim)
      return {t.table + (column - t.column), t.dim, t.first_id, t.hotness, t.mean != 0};
  }
  for (int n = 0; n < numerics.count; ++n)
    if (column == numerics.column[n]) return {numeric + n, numerics.count, 0, 0, false};
  return {};
}

__device__ __forceinline__ float fetch(const Column& c, const int32_t* ids, int64_t row) {
  if (!c.values) return 0.f;
  if (c.hotness == 0) return c.values[row * c.stride];
  if (c.hotness == 1) {
    const int32_t id = ids[c.first_id];
    return id < 0 ? 0.f : c.values[int64_t{id} * c.stride];
  }
  float sum = 0.f;
  int valid = 0;
  for (int h = 0; h < c.hotness; ++h) {
    const int32_t id = ids[c.first_id + h];
    if (id < 0) continue;
    sum += c.values[int64_t{id} * c.stride];
    ++valid;
  }
  return c.mean && valid > 1 ? sum / valid : sum;
}

// Which flat rows an id column may name: the first, and how many.
__device__ int2 rows_of(const Features& features, int k) {
  for (int f = 0; f < features.count; ++f) {
    const Feature& t = features.feature[f];
    if (k >= t.first_id && k < t.first_id + t.hotness) return make_int2(t.row_base, t.rows);
  }
  return make_int2(0, 0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(Batch batch, const __grid_constant__ Features features,
                             const __grid_constant__ Numerics numerics, ForwardTensors p) {
  extern __shared__ int2 id_rows[];  // [K]
  const int64_t first = int64_t{blockIdx.x} * kBlockRows;
  const int64_t last = first + kBlockRows < batch.B ? first + kBlockRows : batch.B;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 2;
  T* const x = static_cast<T*>(p.x);
  if (column < p.W) {
    const Column a = find_column(features, numerics, p.numeric, column);
    const Column b = find_column(features, numerics, p.numeric, column + 1);
#pragma unroll 4
    for (int64_t row = first; row < last; ++row) {
      const int32_t* ids = batch.ids + row * features.K;
      const Pack<T, 2> pair{{from_float<T>(fetch(a, ids, row)), from_float<T>(fetch(b, ids, row))}};
      T* const target = x + row * p.W + column;
      if (p.W % 2 == 0) {
        *reinterpret_cast<Pack<T, 2>*>(target) = pair;
      } else {
        target[0] = pair.v[0];
        if (column + 1 < p.W) target[1] = pair.v[1];
      }
    }
  }
  if (blockIdx.y > 0) return;
  for (int k = threadIdx.x; k < features.K; k += kThreads) id_rows[k] = rows_of(features, k);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int64_t row = first + threadIdx.x / 32; row < last; row += kThreads / 32) {
    float sum = 0.f;
    for (int k = lane; k < features.K; k += 32) {
      const int32_t id = batch.ids[row * features.K + k];
      if (id >= id_rows[k].y) __trap();  // past the table: stop before a gradient is written there
      if (id >= 0) sum += p.wide[id_rows[k].x + id];
    }
    for (int n = lane; n < numerics.count; n += 32) sum += p.numeric[row * numerics.count + n] * p.wide_numeric[n];
    sum = warp_sum(sum);
    if (lane == 0) p.wide_logit[row] = sum + *p.wide_bias;
  }
}

template <typename T>
cudaError_t launch(const Batch& batch, const Features& features, const Numerics& numerics,
                   const ForwardTensors& tensors, cudaStream_t stream) {
  const int64_t slices = ceil_div(tensors.W, 2 * kThreads);
  const dim3 grid(static_cast<unsigned>(ceil_div(batch.B, kBlockRows)), static_cast<unsigned>(slices > 0 ? slices : 1));
  const size_t shared = features.K * sizeof(int2);
  embedding_forward_kernel<T><<<grid, kThreads, shared, stream>>>(batch, features, numerics, tensors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t embedding_forward(const Batch& batch, const Features& features, const Numerics& numerics,
                              const ForwardTensors& tensors, cudaStream_t stream) {
  if (batch.B == 0) return cudaSuccess;
  switch (tensors.x_type) {
    case core::DType::f32:
      return launch<float>(batch, features, numerics, tensors, stream);
    case core::DType::f16:
      return launch<__half>(batch, features, numerics, tensors, stream);
    default:
      return launch<__nv_bfloat16>(batch, features, numerics, tensors, stream);
  }
}

}  // namespace widedeep::kernels
