// A block takes exactly 256 consecutive sorted entries, whatever rows they name, so that a hot row costs no more than
// cold ones. Each of its walkers (16 or 32 lanes that hold a row's sum together) takes a chunk of as many entries as it
// has lanes and finishes the rows whose entries all lie in it. Parts of rows that cross chunks are added in order
// within the block; parts of rows that cross blocks are stored (head: the row began earlier; tail: it goes on), and a
// second kernel adds them in a fixed order and finishes those rows.
#include "kernels/common.cuh"
#include "kernels/embedding.h"
#include "kernels/embedding_walk.cuh"

namespace widedeep::kernels {
namespace {

// Three blocks a multiprocessor hide the loads; float32 needs a few registers more.
template <typename T, int kLanes, typename Sink>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 2 ? 3 : 2)
    chunk_kernel(Batch batch, const __grid_constant__ Features features, Segments s, Gradients g, Sink sink,
                 Parts parts) {
  using BlockRoom = Room<T, kLanes>;
  extern __shared__ Column columns[];
  __shared__ BlockRoom room;
  const int64_t block = blockIdx.x;
  const int64_t total = s.offsets[batch.B * features.K];  // the number of valid ids, whatever place U is
  if (block * kBlock >= total || sink.idle()) return;
  fill_columns(features, columns);
  const int walker = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Sorted sorted{batch.ids, s.entries, columns, total};
  const int32_t before_block = sorted.row_at(block * kBlock - 1, features);
  const Chunk chunk = look_up(sorted, features, g, sink, before_block, room);
  if (lane == 0) room.head_end[walker] = -1;
  const Entry& mine = room.entries[threadIdx.x];
  const bool packed = __ballot_sync(0xffffffffu, !mine.packed) == 0;
  const bool slim = __ballot_sync(0xffffffffu, mine.dim > 4 * kLanes) == 0;
  __syncwarp();  // the warp's entries are in the room
  RowSum sum{};
  const T* const dx = static_cast<const T*>(g.dx);
  if (packed && slim)
    walk<true, 1>(features, dx, sink, chunk, room, sum);
  else if (packed)
    walk<true, 2>(features, dx, sink, chunk, room, sum);
  else
    walk<false, 2>(features, dx, sink, chunk, room, sum);
  const bool open = (chunk.valid & ~chunk.ends) >> (kLanes - 1) & 1;
  if (open && chunk.starts == 0) room.heads.store(sum);
  __syncthreads();
  if (walker == 0 && chunk.head()) {  // began before the block, and is all of it perhaps
    RowSum head{};
    add_heads(room, 0, head);
    store_part<kLanes>(parts, parts.head + block * parts.stride, head);
  }
  if (open && chunk.starts != 0) {
    const int end = add_heads(room, walker + 1, sum);
    if (end >= 0) {
      const Feature& t = features.feature[room.entries[end].feature];
      sink.template finish<kLanes>(t, room.targets[end], sum, rows_packed(t));
      if (lane == 0) room.wide[end] = sum.wide;
    } else {
      store_part<kLanes>(parts, parts.tail + block * parts.stride, sum);
    }
  }
  __syncthreads();
  if (chunk.finished >> lane & 1) sink.finish_wide(room.targets[threadIdx.x].flat, room.wide[threadIdx.x]);
}

// One past the last sorted entry of the row. The lanes of a warp search together: a fifth of the steps of a search by
// halves, each of which waits for memory.
__device__ int64_t end_of_row(const Segments& s, int32_t distinct, int32_t row) {
  int64_t low = 0, high = distinct;  // unique[low] <= row < unique[high]
  while (low + 1 < high) {
    const int64_t step = (high - low + 31) / 32, at = low + step * (threadIdx.x % 32 + 1);
    const bool not_after = at < high && s.unique[at] <= row;
    low += step * __popc(__ballot_sync(0xffffffffu, not_after));
    high = low + step < high ? low + step : high;
  }
  return s.offsets[low + 1];
}

// A row that begins in a block and goes on after it; row -1: none.
struct OpenRow {
  Target target;
  int32_t row, feature;
};

// Each walker looks at one block. Where a row begins in it and goes on, the walker adds the row's parts if they are no
// more than its lanes; else all walkers add them, every so many parts each, and one adds what they have.
template <int kLanes, typename Sink>
__global__ void __launch_bounds__(kBlock)
    join_kernel(Batch batch, const __grid_constant__ Features features, Segments s, Sink sink, Parts parts) {
  constexpr int kWalkers = kBlock / kLanes;
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kLanes);
  using Sums = WalkerSums<kLanes>;
  extern __shared__ Column columns[];
  __shared__ Sums sums;
  __shared__ OpenRow long_rows[kWalkers];
  const int64_t total = s.offsets[batch.B * features.K], first_block = int64_t{blockIdx.x} * kWalkers;
  if (first_block * kBlock >= total || sink.idle()) return;
  fill_columns(features, columns);
  const Sorted sorted{batch.ids, s.entries, columns, total};
  const int walker = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t block = first_block + walker, last = (block + 1) * kBlock - 1;
  const int32_t row = sorted.row_at(last, features);
  const bool reaches = row >= 0 && row == sorted.row_at((block + 1 + lane) * kBlock, features);
  const uint32_t reached = __ballot_sync(0xffffffffu, reaches) >> (threadIdx.x % 32 - lane) & kMask;  // blocks after
  const bool open = (reached & 1) && row != sorted.row_at(last - kBlock, features), is_long = reached == kMask;
  OpenRow mine{{}, -1, 0};
  if (open) {
    mine.row = row;
    mine.feature = columns[s.entries[last] % features.K];
    mine.target = sink.target(features.feature[mine.feature], mine.feature, row);
  }
  if (lane == 0) long_rows[walker] = is_long ? mine : OpenRow{{}, -1, 0};
  __syncthreads();  // every lane has asked for its target
  const auto finish = [&](const OpenRow& r, const RowSum& sum) {
    const Feature& t = features.feature[r.feature];
    sink.template finish<kLanes>(t, r.target, sum, rows_packed(t));
    if (lane == 0) sink.finish_wide(r.target.flat, sum.wide);
  };
  if (open && !is_long) {
    RowSum sum{};
    add_parts<kLanes>(parts, block, 0, 1, 1 + __popc(reached), sum);
    finish(mine, sum);
  }
  for (int w = 0; w < kWalkers; ++w) {
    if (long_rows[w].row < 0) continue;
    const int64_t end = end_of_row(s, s.table_start[features.count], long_rows[w].row);
    const int64_t count = (end - 1) / kBlock - (first_block + w) + 1;
    RowSum sum{};
    add_parts<kLanes>(parts, first_block + w, walker, kWalkers, count, sum);
    sums.store(sum);
    __syncthreads();
    if (walker == 0) {
      RowSum all{};
      for (int other = 0; other < kWalkers; ++other) sums.add_to(all, other);
      finish(long_rows[w], all);
    }
    __syncthreads();
  }
}

int max_dim_of(const Features& features) {
  int most = 1;
  for (int f = 0; f < features.count; ++f) most = features.feature[f].dim > most ? features.feature[f].dim : most;
  return most;
}

int wide_at(const Features& features) { return (max_dim_of(features) + 3) / 4 * 4; }
int part_stride(const Features& features) { return wide_at(features) + 4; }  // parts begin at multiples of 16 bytes

template <typename T, int kLanes, typename Sink>
cudaError_t launch(const Batch& batch, const Features& features, const Segments& s, const Gradients& g,
                   const Sink& sink, void* workspace, cudaStream_t stream) {
  const int64_t n = batch.B * features.K, blocks = ceil_div(n, kBlock);
  auto* const head = static_cast<float*>(workspace);
  const Parts parts{head, head + blocks * part_stride(features), wide_at(features), part_stride(features)};
  const auto joins = static_cast<unsigned>(ceil_div(blocks, kBlock / kLanes));
  const size_t shared = features.K * sizeof(Column);
  const auto chunks = static_cast<unsigned>(blocks);
  chunk_kernel<T, kLanes><<<chunks, kBlock, shared, stream>>>(batch, features, s, g, sink, parts);
  if (const cudaError_t error = cudaGetLastError()) return error;
  join_kernel<kLanes><<<joins, kBlock, shared, stream>>>(batch, features, s, sink, parts);
  return cudaGetLastError();
}

template <typename Sink>
cudaError_t backward(const Batch& batch, const Features& features, const Segments& s, const Gradients& g,
                     const Sink& sink, void* workspace, cudaStream_t stream) {
  if (batch.B * features.K == 0) return cudaSuccess;
  const bool narrow = max_dim_of(features) <= 128;
  switch (g.dx_type) {
    case core::DType::f32:
      return narrow ? launch<float, 16>(batch, features, s, g, sink, workspace, stream)
                    : launch<float, 32>(batch, features, s, g, sink, workspace, stream);
    case core::DType::f16:
      return narrow ? launch<__half, 16>(batch, features, s, g, sink, workspace, stream)
                    : launch<__half, 32>(batch, features, s, g, sink, workspace, stream);
    default:
      return narrow ? launch<__nv_bfloat16, 16>(batch, features, s, g, sink, workspace, stream)
                    : launch<__nv_bfloat16, 32>(batch, features, s, g, sink, workspace, stream);
  }
}

}  // namespace

size_t backward_workspace(int64_t n, const Features& features) {
  return 2 * ceil_div(n, kBlock) * part_stride(features) * sizeof(float);
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
