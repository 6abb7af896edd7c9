// A block takes some rows of a slice of the deep input, at most 256 columns wide, and stages the rows' ids in shared
// memory. A thread owns four neighbouring columns, finds out once what they hold, and loads several rows' before it
// writes any, so that the latency of rows that lie anywhere is paid once for all of them. Blocks of one slice run
// together: what the caches hold at a time are the rows of the slice's few tables. The first slice's blocks also sum
// the wide logit, a few lanes a row.
#include <bit>

#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kOwned = 4;                 // columns of a thread: 16 bytes of a table
constexpr int kAcross = 64;               // threads side by side, at most
constexpr int kFlight = 8;                // rows that a thread loads together
constexpr int kMostRows = 128;            // of a block: what its columns hold is found once for all
constexpr int kFewestRows = 8;            // where the batch is small
constexpr int kEnoughBlocks = 3;          // a multiprocessor: what fewer rows a block are for
constexpr int kStagedIds = 4096;          // of a block, 16 KB; more only where one row has more
constexpr int kNumeric = kMaxFeatures;    // owners from here on are numerics
constexpr int kSlice = kAcross * kOwned;  // columns
static_assert(kSlice == kThreads);

// What one column of the deep input holds: a column of a table, a numeric, or nothing.
struct Source {
  const float* values = nullptr;  // the table moved to the column, or the numerics to theirs in the block's first row
  int32_t stride = 0;             // dim, or N for a numeric; with null values nothing: zeros
  int32_t first_id = -1;          // of a numeric -1: it is named by the number of the row in the block
  int32_t hotness = 1;
  bool mean = false;
};

// The rows of a block, with what it shares.
struct Rows {
  int64_t first;  // of the batch
  int count, K;
  const int32_t* ids;  // [count, K], staged

  __device__ __forceinline__ const int32_t* of(int row) const { return ids + row * K; }
};

__device__ __forceinline__ int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

__device__ void stage_ids(const int32_t* from, int n, int32_t* ids) {
  for (int start = thread_of_block(); start < n; start += kThreads * kFlight) {
    int32_t id[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) id[u] = start + u * kThreads < n ? __ldg(from + start + u * kThreads) : 0;
#pragma unroll
    for (int u = 0; u < kFlight; ++u)
      if (start + u * kThreads < n) ids[start + u * kThreads] = id[u];
  }
}

// owner[c] = the feature (numerics from kNumeric on) that column base + c belongs to, or -1. A barrier must follow.
__device__ void find_owners(const Features& features, const Numerics& numerics, int base, int32_t* owner) {
  const int thread = thread_of_block();
  owner[thread] = -1;
  __syncthreads();
  for (int f = thread / 32; f < features.count; f += kThreads / 32) {
    const int begin = features.feature[f].column - base, end = begin + features.feature[f].dim;
    for (int c = (begin > 0 ? begin : 0) + thread % 32; c < end && c < kSlice; c += 32) owner[c] = f;
  }
  for (int n = thread; n < numerics.count; n += kThreads) {
    const int c = numerics.column[n] - base;
    if (c >= 0 && c < kSlice) owner[c] = kNumeric + n;
  }
}

__device__ Source source_of(const Features& features, const Numerics& numerics, const float* numeric, int owner,
                            int column, int64_t first_row) {
  if (owner < 0) return {};
  if (owner >= kNumeric)
    return {numeric + first_row * numerics.count + (owner - kNumeric), numerics.count, -1, 1, false};
  const Feature& t = features.feature[owner];
  return {t.table + (column - t.column), t.dim, t.first_id, t.hotness, t.mean != 0};
}

// Whether four columns can travel as one load: they belong to one table, whose rows are whole packs.
__device__ bool is_pack(const Features& features, int owner, int column) {
  if (owner < 0 || owner >= kNumeric) return false;
  const Feature& t = features.feature[owner];
  return t.dim % kOwned == 0 && (column - t.column) % kOwned == 0 && reinterpret_cast<uintptr_t>(t.table) % 16 == 0;
}

// Nothing in this kernel writes what it loads here.
template <int N>
__device__ __forceinline__ Pack<float, N> load(const float* at) {
  if constexpr (N == kOwned)
    return std::bit_cast<Pack<float, N>>(__ldg(reinterpret_cast<const float4*>(at)));
  else
    return {__ldg(at)};
}

// Of the row that an id names; below 0 is padding.
template <int N>
__device__ __forceinline__ Pack<float, N> fetch(const Source& s, int32_t row) {
  Pack<float, N> values{};
  if (row >= 0) values = load<N>(s.values + int64_t{row} * s.stride);
  return values;
}

__device__ __forceinline__ float fetch_single(const Source& s, const Rows& rows, int row) {
  const int32_t named = s.first_id < 0 ? row : rows.of(row)[s.first_id];
  return s.values && named >= 0 ? __ldg(s.values + int64_t{named} * s.stride) : 0.f;
}

// The sum or mean of the rows that a list of ids names; four are in flight.
template <int N>
__device__ __forceinline__ Pack<float, N> fetch_list(const Source& s, const int32_t* ids) {
  Pack<float, N> sum{};
  int valid = 0;
  for (int h = 0; h < s.hotness; h += 4) {
    Pack<float, N> values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int32_t id = h + u < s.hotness ? ids[h + u] : -1;
      valid += id >= 0;
      values[u] = fetch<N>(s, id);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int e = 0; e < N; ++e) sum.v[e] += values[u].v[e];
  }
  if (s.mean && valid > 1)
#pragma unroll
    for (int e = 0; e < N; ++e) sum.v[e] /= valid;
  return sum;
}

// Four columns of one row. They are read after much else has been written, and should not displace the tables' rows.
template <typename T>
__device__ __forceinline__ void put(T* target, const Pack<float, kOwned>& values) {
  Pack<T, kOwned> pack;
#pragma unroll
  for (int e = 0; e < kOwned; ++e) pack.v[e] = from_float<T>(values.v[e]);
  if constexpr (sizeof(pack) == 8)
    __stcs(reinterpret_cast<uint2*>(target), std::bit_cast<uint2>(pack));
  else
    __stcs(reinterpret_cast<uint4*>(target), std::bit_cast<uint4>(pack));
}

// Writes the thread's four columns of its rows, kTogether at a time. Past the end the last row is fetched again, which
// costs less than to ask before each load. x: of the block's first row and the thread's first column.
template <int kTogether, typename T, typename Fetch>
__device__ __forceinline__ void write_rows(T* x, int W, int count, Fetch fetch) {
  const int step = blockDim.y;
  const int64_t pitch = int64_t{step} * W;
  for (int row = threadIdx.y; row < count; row += kTogether * step) {
    Pack<float, kOwned> values[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) values[u] = fetch(min(row + u * step, count - 1));
    T* target = x + int64_t{row} * W;
#pragma unroll
    for (int u = 0; u < kTogether; ++u, target += pitch)
      if (row + u * step < count) put(target, values[u]);
  }
}

template <typename T>
__device__ __forceinline__ void write_columns(const Features& features, const Numerics& numerics,
                                              const ForwardTensors& p, const int32_t* owner, int column,
                                              const Rows& rows) {
  const int W = static_cast<int>(p.W);
  T* const x = static_cast<T*>(p.x) + rows.first * W + column;
  const auto source = [&](int e) { return source_of(features, numerics, p.numeric, owner[e], column + e, rows.first); };
  bool simple = W % kOwned == 0;
  if (simple && is_pack(features, owner[0], column)) {
    const Source s = source(0);
    if (s.hotness == 1)
      return write_rows<kFlight>(x, W, rows.count, [&](int row) { return fetch<kOwned>(s, rows.of(row)[s.first_id]); });
    return write_rows<1>(x, W, rows.count, [&](int row) { return fetch_list<kOwned>(s, rows.of(row) + s.first_id); });
  }
  // Neighbours of several tables, numerics, padding, or a table that no pack fits into.
  const Source sources[kOwned]{source(0), source(1), source(2), source(3)};
#pragma unroll
  for (int e = 0; e < kOwned; ++e) simple &= sources[e].hotness == 1;
  if (simple)
    return write_rows<kFlight / 2>(x, W, rows.count, [&](int row) {
      return Pack<float, kOwned>{{fetch_single(sources[0], rows, row), fetch_single(sources[1], rows, row),
                                  fetch_single(sources[2], rows, row), fetch_single(sources[3], rows, row)}};
    });
#pragma unroll 1
  for (int e = 0; e < kOwned && column + e < W; ++e) {
    const Source s = source(e);
    for (int row = threadIdx.y; row < rows.count; row += blockDim.y)
      x[int64_t{row} * W + e] =
          from_float<T>(s.hotness == 1 ? fetch_single(s, rows, row) : fetch_list<1>(s, rows.of(row) + s.first_id).v[0]);
  }
}

// The part of a sum over [0, count) that one of `lanes` threads adds; its loads are made four at a time.
template <typename Value>
__device__ __forceinline__ float lane_sum(int count, int lane, int lanes, Value value) {
  float sum = 0.f;
  for (int first = lane; first < count; first += 4 * lanes) {
    float values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) values[u] = first + u * lanes < count ? value(first + u * lanes) : 0.f;
#pragma unroll
    for (int u = 0; u < 4; ++u) sum += values[u];
  }
  return sum;
}

// A few neighbouring threads sum a row. feature_of [K]: of each id; table_rows: first flat row and number of rows.
__device__ __forceinline__ void sum_wide(const Rows& rows, const Numerics& numerics, const ForwardTensors& p,
                                         const uint8_t* feature_of, const int2* table_rows) {
  const int N = numerics.count, lanes = rows.K + N <= 64 ? 4 : 32;
  const int thread = thread_of_block(), lane = thread % lanes;
  bool past = false;
  // All lanes of a warp come along, as the sums across them demand.
  for (int start = thread / 32 * (32 / lanes); start < rows.count; start += kThreads / lanes) {
    const int row = start + thread % 32 / lanes;
    const bool inside = row < rows.count;
    float sum = lane_sum(inside ? rows.K : 0, lane, lanes, [&](int k) {
      const int32_t id = rows.of(row)[k];
      const int2 table = table_rows[feature_of[k]];
      past |= id >= table.y;
      return id >= 0 && id < table.y ? __ldg(p.wide + table.x + id) : 0.f;
    });
    const float* const numeric = p.numeric + (rows.first + row) * N;
    sum += lane_sum(inside ? N : 0, lane, lanes, [&](int n) { return __ldg(numeric + n) * __ldg(p.wide_numeric + n); });
    for (int bits = lanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (inside && lane == 0) p.wide_logit[rows.first + row] = sum + *p.wide_bias;
  }
  if (past) __trap();  // an id past its table: stop before a gradient is written there
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    embedding_forward_kernel(Batch batch, const __grid_constant__ Features features,
                             const __grid_constant__ Numerics numerics, ForwardTensors p, int block_rows) {
  extern __shared__ int32_t ids[];  // [block_rows, K], then one byte for each of K
  __shared__ int32_t owner[kSlice];
  __shared__ int2 table_rows[kMaxFeatures];
  uint8_t* const feature_of = reinterpret_cast<uint8_t*>(ids + block_rows * features.K);
  const int64_t first = int64_t{blockIdx.x} * block_rows, left = batch.B - first;
  const Rows rows{first, left < block_rows ? static_cast<int>(left) : block_rows, features.K, ids};
  const int base = blockIdx.y * blockDim.x * kOwned, column = base + threadIdx.x * kOwned;
  const int thread = thread_of_block();
  stage_ids(batch.ids + first * rows.K, rows.count * rows.K, ids);
  if (blockIdx.y == 0) {
    for (int f = thread / 32; f < features.count; f += kThreads / 32) {
      const Feature& t = features.feature[f];
      for (int h = thread % 32; h < t.hotness; h += 32) feature_of[t.first_id + h] = static_cast<uint8_t>(f);
      table_rows[f] = make_int2(t.row_base, t.rows);
    }
  }
  find_owners(features, numerics, base, owner);
  __syncthreads();
  if (column < p.W) write_columns<T>(features, numerics, p, owner + threadIdx.x * kOwned, column, rows);
  if (blockIdx.y == 0) sum_wide(rows, numerics, p, feature_of, table_rows);
}

template <typename T>
cudaError_t launch(const Batch& batch, const Features& features, const Numerics& numerics,
                   const ForwardTensors& tensors, cudaStream_t stream) {
  int across = 8, rows = kMostRows, device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  while (across < kAcross && across * kOwned < tensors.W) across *= 2;
  const int64_t slices = tensors.W > 0 ? ceil_div(tensors.W, across * kOwned) : 1;
  while (rows > kFewestRows && ceil_div(batch.B, rows) * slices < kEnoughBlocks * multiprocessors) rows /= 2;
  while (rows > 1 && rows * features.K > kStagedIds) rows /= 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(batch.B, rows)), static_cast<unsigned>(slices));
  const size_t shared = features.K * (rows * sizeof(int32_t) + sizeof(uint8_t));
  const dim3 block(static_cast<unsigned>(across), static_cast<unsigned>(kThreads / across));
  embedding_forward_kernel<T><<<grid, block, shared, stream>>>(batch, features, numerics, tensors, rows);
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
