// A warp takes exactly 32 consecutive sorted entries, whatever rows they name, so that a hot row costs no more than
// cold ones. A row whose entries all lie in the chunk is finished at once; the part of a row that reaches into other
// chunks is stored (head: it began earlier; tail: it goes on), and a second kernel adds the parts in chunk order and
// finishes those rows.
#include "kernels/common.cuh"
#include "kernels/embedding.h"
#include "kernels/embedding_sinks.cuh"

namespace widedeep::kernels {
namespace {

constexpr int kChunk = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * 32;
constexpr int kAhead = 4;  // entries whose gradients are loaded together

__host__ __device__ inline int part_stride(int max_dim) {
  return (max_dim + 1 + 3) / 4 * 4;
}  // the row, then its wide sum

struct Parts {
  float *head, *tail;  // [chunks, stride]
  int stride;
};

struct IdColumn {
  int32_t feature, row_base;
};

__device__ void fill_columns(const Features& features, IdColumn* columns) {
  for (int f = threadIdx.x; f < features.count; f += kThreads)
    for (int h = 0; h < features.feature[f].hotness; ++h)
      columns[features.feature[f].first_id + h] = {f, features.feature[f].row_base};
  __syncthreads();
}

// The flat row of sorted entry i; -1 outside [0, total).
__device__ __forceinline__ int32_t row_at(int64_t i, int64_t total, const Batch& batch, const Features& features,
                                          const int32_t* entries, const IdColumn* columns) {
  if (i < 0 || i >= total) return -1;
  const int32_t entry = entries[i];
  return columns[entry % features.K].row_base + batch.ids[entry];
}

// 1 / the number of valid ids of the sample, for features that take the mean; 1 otherwise.
__device__ float share(const Feature& t, const int32_t* ids) {
  if (!t.mean || t.hotness == 1) return 1.f;
  int valid = 0;
  for (int h = 0; h < t.hotness; ++h) valid += ids[t.first_id + h] >= 0;
  return 1.f / valid;
}

template <int kColumns>
__device__ __forceinline__ void store_part(float* part, int max_dim, const float (&sum)[kColumns], float wide_sum) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (lane + 32 * c < max_dim) part[lane + 32 * c] = sum[c];
  if (lane == 0) part[max_dim] = wide_sum;
}

template <typename T, int kColumns, typename Sink>
__global__ void __launch_bounds__(kThreads) chunk_kernel(Batch batch, const __grid_constant__ Features features,
                                                         Segments s, Gradients g, Sink sink, Parts parts, int max_dim) {
  extern __shared__ IdColumn columns[];
  if (sink.idle()) return;
  fill_columns(features, columns);
  const int lane = threadIdx.x % 32;
  const int64_t chunk = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32, i = chunk * kChunk + lane;
  const int64_t total = s.offsets[batch.B * features.K];  // the number of valid ids, whatever place U is
  if (chunk * kChunk >= total) return;
  const T* const dx = static_cast<const T*>(g.dx);
  const float inverse = g.grad_scale ? 1.f / *g.grad_scale : 1.f;

  // Each lane knows one entry; the warp then walks the 32 in order.
  const int32_t row = row_at(i, total, batch, features, s.entries, columns);
  int32_t before = __shfl_up_sync(0xffffffffu, row, 1), after = __shfl_down_sync(0xffffffffu, row, 1);
  if (lane == 0) before = row_at(i - 1, total, batch, features, s.entries, columns);
  if (lane == 31) after = row_at(i + 1, total, batch, features, s.entries, columns);
  const uint32_t starts = __ballot_sync(0xffffffffu, row >= 0 && row != before);
  const uint32_t ends = __ballot_sync(0xffffffffu, row >= 0 && row != after);
  const int count = __popc(__ballot_sync(0xffffffffu, row >= 0));
  int32_t sample = 0, feature = 0;
  float weight = 0.f, dlogit = 0.f;
  if (row >= 0) {
    const int32_t entry = s.entries[i];
    sample = entry / features.K;
    feature = columns[entry % features.K].feature;
    weight = inverse * share(features.feature[feature], batch.ids + int64_t{sample} * features.K);
    dlogit = inverse * g.dlogit[sample];
  }

  float sum[kColumns] = {}, wide_sum = 0.f;
  bool began_here = false;
  for (int first = 0; first < count; first += kAhead) {
    float ahead[kAhead][kColumns];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = first + a < count ? first + a : count - 1;
      const Feature& t = features.feature[__shfl_sync(0xffffffffu, feature, at)];
      const T* source = dx + __shfl_sync(0xffffffffu, sample, at) * g.W + t.column;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) ahead[a][c] = lane + 32 * c < t.dim ? to_float(source[lane + 32 * c]) : 0.f;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = first + a;
      if (at >= count) break;
      if (starts >> at & 1) {
        began_here = true;
        wide_sum = 0.f;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[c] = 0.f;
      }
      const float w = __shfl_sync(0xffffffffu, weight, at);
      wide_sum += __shfl_sync(0xffffffffu, dlogit, at);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += ahead[a][c] * w;
      if (!(ends >> at & 1)) continue;
      if (began_here)
        sink.finish(features.feature[__shfl_sync(0xffffffffu, feature, at)], __shfl_sync(0xffffffffu, row, at), sum,
                    wide_sum);
      else
        store_part(parts.head + chunk * parts.stride, max_dim, sum, wide_sum);
    }
  }
  if (!(ends >> (count - 1) & 1))
    store_part((began_here ? parts.tail : parts.head) + chunk * parts.stride, max_dim, sum, wide_sum);
}

// One past the last sorted entry of the row that holds entry i.
__device__ int64_t end_of_row(const Segments& s, int32_t distinct, int32_t row) {
  int32_t low = 0, high = distinct;
  while (low + 1 < high) {
    const int32_t middle = (low + high) / 2;
    (s.unique[middle] <= row ? low : high) = middle;
  }
  return s.offsets[low + 1];
}

// A block looks at eight chunks; where a row begins in one and goes on, its warps add the parts: each every eighth, in
// order.
template <int kColumns, typename Sink>
__global__ void __launch_bounds__(kThreads) join_kernel(Batch batch, const __grid_constant__ Features features,
                                                        Segments s, Sink sink, Parts parts, int max_dim) {
  extern __shared__ IdColumn columns[];
  __shared__ float shared[kWarps][kColumns * 32 + 1];
  __shared__ int32_t open_row[kWarps];
  if (sink.idle()) return;
  const int64_t total = s.offsets[batch.B * features.K];
  const int64_t first_chunk = int64_t{blockIdx.x} * kWarps;
  if (first_chunk * kChunk >= total) return;
  fill_columns(features, columns);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
    const int64_t last = (first_chunk + warp + 1) * kChunk - 1;
    const int32_t row = row_at(last, total, batch, features, s.entries, columns);
    const bool goes_on = row >= 0 && row == row_at(last + 1, total, batch, features, s.entries, columns);
    const bool began = row != row_at(last - kChunk, total, batch, features, s.entries, columns);
    open_row[warp] = goes_on && began ? row : -1;
  }
  __syncthreads();
  for (int open = 0; open < kWarps; ++open) {
    const int32_t row = open_row[open];
    if (row < 0) continue;
    const int64_t chunk = first_chunk + open;
    const int64_t parts_after = (end_of_row(s, s.table_start[features.count], row) - 1) / kChunk - chunk;
    float sum[kColumns] = {}, wide_sum = 0.f;
#pragma unroll 4  // a hot row has thousands of parts: their loads must be in flight together
    for (int64_t part = warp; part <= parts_after; part += kWarps) {
      const float* source = (part == 0 ? parts.tail : parts.head) + (chunk + part) * parts.stride;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (lane + 32 * c < max_dim) sum[c] += source[lane + 32 * c];
      wide_sum += source[max_dim];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shared[warp][lane + 32 * c] = sum[c];
    if (lane == 0) shared[warp][kColumns * 32] = wide_sum;
    __syncthreads();
    if (warp == 0) {
      wide_sum = 0.f;
      for (int w = 0; w < kWarps; ++w) wide_sum += shared[w][kColumns * 32];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum[c] = 0.f;
        for (int w = 0; w < kWarps; ++w) sum[c] += shared[w][lane + 32 * c];
      }
      const int32_t entry = s.entries[chunk * kChunk + kChunk - 1];
      sink.finish(features.feature[columns[entry % features.K].feature], row, sum, wide_sum);
    }
    __syncthreads();
  }
}

int max_dim_of(const Features& features) {
  int most = 1;
  for (int f = 0; f < features.count; ++f) most = features.feature[f].dim > most ? features.feature[f].dim : most;
  return most;
}

template <typename T, int kColumns, typename Sink>
cudaError_t launch(const Batch& batch, const Features& features, const Segments& s, const Gradients& g,
                   const Sink& sink, void* workspace, cudaStream_t stream) {
  const int64_t chunks = ceil_div(batch.B * features.K, kChunk);
  const int max_dim = max_dim_of(features), stride = part_stride(max_dim);
  auto* head = static_cast<float*>(workspace);
  const Parts parts{head, head + chunks * stride, stride};
  const auto blocks = static_cast<unsigned>(ceil_div(chunks, kWarps));
  const size_t shared = features.K * sizeof(IdColumn);
  chunk_kernel<T, kColumns><<<blocks, kThreads, shared, stream>>>(batch, features, s, g, sink, parts, max_dim);
  if (const cudaError_t error = cudaGetLastError()) return error;
  join_kernel<kColumns><<<blocks, kThreads, shared, stream>>>(batch, features, s, sink, parts, max_dim);
  return cudaGetLastError();
}

template <typename Sink>
cudaError_t backward(const Batch& batch, const Features& features, const Segments& s, const Gradients& g,
                     const Sink& sink, void* workspace, cudaStream_t stream) {
  if (batch.B * features.K == 0) return cudaSuccess;
  const bool narrow = max_dim_of(features) <= 128;
  switch (g.dx_type) {
    case core::DType::f32:
      return narrow ? launch<float, 4>(batch, features, s, g, sink, workspace, stream)
                    : launch<float, 8>(batch, features, s, g, sink, workspace, stream);
    case core::DType::f16:
      return narrow ? launch<__half, 4>(batch, features, s, g, sink, workspace, stream)
                    : launch<__half, 8>(batch, features, s, g, sink, workspace, stream);
    default:
      return narrow ? launch<__nv_bfloat16, 4>(batch, features, s, g, sink, workspace, stream)
                    : launch<__nv_bfloat16, 8>(batch, features, s, g, sink, workspace, stream);
  }
}

}  // namespace

size_t backward_workspace(int64_t n, const Features& features) {
  return 2 * ceil_div(n, kChunk) * part_stride(max_dim_of(features)) * sizeof(float);
}

cudaError_t embedding_update(const Batch& batch, const Features& features, const Segments& segments,
                             const Gradients& gradients, const RowUpdate& update, void* workspace,
                             cudaStream_t stream) {
  return backward(batch, features, segments, gradients, Update{update}, workspace, stream);
}

cudaError_t embedding_row_gradients(const Batch& batch, const Features& features, const Segments& segments,
                                    const Gradients& gradients, float* wide, void* workspace, cudaStream_t stream) {
  return backward(batch, features, segments, gradients,
                  Store{segments.unique, segments.table_start, features.count, wide}, workspace, stream);
}

}  // namespace widedeep::kernels
