// A block takes exactly 256 consecutive sorted entries, whatever rows they name, so that a hot row costs no more than
// cold ones. Each of its walkers (16 or 32 lanes that hold a row's sum together) takes a chunk of as many entries as it
// has lanes and finishes the rows whose entries all lie in it. Parts of rows that cross chunks are added in order
// within the block; parts of rows that cross blocks are stored (head: the row began earlier; tail: it goes on), and a
// second kernel adds them in a fixed order and finishes those rows.
#include "kernels/common.cuh"
#include "kernels/embedding.h"
#include "kernels/embedding_join.cuh"
#include "kernels/embedding_walk.cuh"

namespace widedeep::kernels {
namespace {

// Four blocks a multiprocessor hide the loads.
template <typename T, int kLanes, typename Sink>
__global__ void __launch_bounds__(kBlock, 4) chunk_kernel(Batch batch, const __grid_constant__ Features features,
                                                          Segments s, Gradients g, Sink sink, Parts parts) {
  using BlockRoom = Room<T, kLanes>;
  extern __shared__ Column columns[];
  __shared__ BlockRoom room;
  let_join_begin();
  const int64_t block = blockIdx.x;
  const Sorted sorted{s.entries, s.keys, batch.B * features.K};
  const Loaded loaded = load_ids(sorted, block);
  const int32_t entry = loaded.own.entry;
  if (sink.idle()) return;
  fill_columns(features, columns);
  if (!__syncthreads_or(entry >= 0)) return;  // past the valid ids
  const int walker = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const T* const dx = static_cast<const T*>(g.dx);
  const Entry mine = describe_entry<T>(batch, features, columns, g, entry);
  room.entries[threadIdx.x] = mine;
  if (lane == 0) room.head_end[walker] = -1;
  const bool packed = __ballot_sync(0xffffffffu, !mine.packed) == 0;
  const bool slim = __ballot_sync(0xffffffffu, mine.dim > 4 * kLanes) == 0;
  __syncwarp();  // the warp's entries are in the room
  if (packed && slim)
    begin_walk<1>(dx, room);
  else if (packed)
    begin_walk<2>(dx, room);
  const Chunk chunk = place_rows(features, sink, loaded, room);
  const bool finishes = chunk.finished >> lane & 1;
  load_wide(features, g, sink, entry, finishes, room);
  __syncwarp();
  RowSum sum{};
  if (packed && slim)
    walk_packed<1>(features, dx, sink, chunk, room, sum);
  else if (packed)
    walk_packed<2>(features, dx, sink, chunk, room, sum);
  else
    walk_elements(features, dx, sink, chunk, room, sum);
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
  if (finishes) sink.finish_wide(room.targets[threadIdx.x].flat, room.wide[threadIdx.x], room.wide_state[threadIdx.x]);
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
  const size_t shared = features.K * sizeof(Column);
  const auto chunks = static_cast<unsigned>(blocks);
  chunk_kernel<T, kLanes><<<chunks, kBlock, shared, stream>>>(batch, features, s, g, sink, parts);
  if (const cudaError_t error = cudaGetLastError()) return error;
  return launch_early(join_kernel<kLanes, Sink>, ceil_div(blocks, kBlock / kLanes), kBlock, shared, stream, batch,
                      features, s, sink, parts);
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
