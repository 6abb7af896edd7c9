// How a block of the embeddings' backward pass looks up its sorted entries and sums the rows that lie in it. Included
// by embedding_backward.cu alone.
#pragma once
#include "kernels/embedding_parts.cuh"

namespace widedeep::kernels {

// Packs of gradients that a thread loads together: of as many entries where rows need one group, else of half.
template <typename T>
constexpr int kPacks = 16 / sizeof(T);

// What a block of the first kernel keeps in shared memory.
template <typename T, int kLanes>
struct Room {
  Entry entries[kBlock];
  Target targets[kBlock];  // of rows that end at the entry and are finished by the block
  float dlogit[kBlock];
  float wide[kBlock];  // sums of these rows
  WalkerSums<kLanes> heads;
  int32_t head_end[kBlock / kLanes];        // the entry at which a walker's head ends, or -1: it goes on
  Pack<T, 4> gradients[kPacks<T>][kBlock];  // each thread's own
};

// A walker's chunk; bit l is its entry l.
struct Chunk {
  uint32_t valid, starts, ends;  // there is an entry; a row starts there; a row ends there
  uint32_t finished;             // a row ends there that the block finishes

  __device__ bool head() const { return (valid & ~starts & 1) != 0; }
};

// Each thread looks up one entry of the block. before_block: the row of the entry before it.
template <int kLanes, typename T, typename Sink>
__device__ __forceinline__ Chunk look_up(const Sorted& sorted, const Features& features, const Gradients& g,
                                         const Sink& sink, int32_t before_block, Room<T, kLanes>& room) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  const int32_t row = sorted.row_at(i, features);
  int32_t before = __shfl_up_sync(0xffffffffu, row, 1), after = __shfl_down_sync(0xffffffffu, row, 1);
  if (lane == 0) before = sorted.row_at(i - 1, features);
  if (lane == 31) after = sorted.row_at(i + 1, features);
  const bool valid = row >= 0, ends = valid && row != after, finished = ends && row != before_block;
  Entry& mine = room.entries[threadIdx.x];
  mine = {0, 0.f, 0, 0, 1};
  room.dlogit[threadIdx.x] = 0.f;
  if (valid) {
    const int32_t entry = sorted.entries[i], sample = entry / features.K;
    const int feature = sorted.columns[entry % features.K];
    const Feature& t = features.feature[feature];
    const float inverse = g.grad_scale ? 1.f / *g.grad_scale : 1.f;
    const bool packed = rows_packed(t) && t.column % 4 == 0 && g.W % 4 == 0 && aligned(g.dx, 4 * sizeof(T));
    mine.source = int64_t{sample} * g.W + t.column;
    mine.weight = inverse * share(t, sorted.ids + int64_t{sample} * features.K);
    mine.dim = static_cast<int16_t>(t.dim);
    mine.feature = static_cast<uint8_t>(feature);
    mine.packed = packed;
    room.dlogit[threadIdx.x] = inverse * g.dlogit[sample];
    if (finished) room.targets[threadIdx.x] = sink.target(t, feature, row);
  }
  const int shift = lane / kLanes * kLanes;
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kLanes);
  const auto chunk_bits = [=](bool value) { return __ballot_sync(0xffffffffu, value) >> shift & kMask; };
  const uint32_t valid_bits = chunk_bits(valid), starts_bits = chunk_bits(valid && row != before);
  const uint32_t ends_bits = chunk_bits(ends);
  return {valid_bits, starts_bits, ends_bits, chunk_bits(finished)};
}

// Walks a chunk in order and finishes the rows that begin and end in it. Leaves the head in the room and what is open
// at the end in `sum`. kPacked: all gradients and rows of the warp are whole packs; kUsed: groups that they need.
// Gradients pass through shared memory, where a loop can index them: the many instructions that finish a row then stand
// here once, and the loads of the next entries are in flight meanwhile.
template <bool kPacked, int kUsed, int kLanes, typename T, typename Sink>
__device__ __forceinline__ void walk(const Features& features, const T* dx, const Sink& sink, const Chunk& chunk,
                                     Room<T, kLanes>& room, RowSum& sum) {
  const int lane = threadIdx.x % kLanes, chunk_first = static_cast<int>(threadIdx.x) - lane;
  constexpr int kAhead = kPacks<T> / kUsed;
  Pack<T, 4> ahead[kAhead][kUsed];
  const auto load = [&](int first) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const Entry entry = room.entries[chunk_first + first + a];
#pragma unroll
      for (int group = 0; group < kUsed; ++group) {
        const int column = column_of<kLanes>(group);
        ahead[a][group] = load4(dx + entry.source + column, entry.dim - column, kPacked);
      }
    }
  };
  if (kPacked) load(0);
#pragma unroll 1
  for (int first = 0; first < kLanes; first += kAhead) {
    if (!kPacked) load(first);  // single elements would take too many registers while rows are finished
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int group = 0; group < kUsed; ++group) room.gradients[a * kUsed + group][threadIdx.x] = ahead[a][group];
    if (kPacked && first + kAhead < kLanes) load(first + kAhead);
#pragma unroll 1
    for (int a = 0; a < kAhead; ++a) {
      const int at = first + a, in_block = chunk_first + at;
      sum.wide += room.dlogit[in_block];
#pragma unroll
      for (int group = 0; group < kUsed; ++group) {
        const Pack<T, 4> gradient = room.gradients[a * kUsed + group][threadIdx.x];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.deep[group][e] += to_float(gradient.v[e]) * room.entries[in_block].weight;
      }
      if (!(chunk.ends >> at & 1)) continue;
      if (chunk.starts & ((2u << at) - 1)) {
        const Feature& t = features.feature[room.entries[in_block].feature];
        sink.template finish<kLanes, kUsed>(t, room.targets[in_block], sum, kPacked || rows_packed(t));
        if (lane == 0) room.wide[in_block] = sum.wide;
      } else {
        room.heads.store(sum);
        if (lane == 0) room.head_end[threadIdx.x / kLanes] = in_block;
      }
      sum = {};
    }
  }
}

// Adds the heads from the walker on to the end of their row. Returns the entry at which it ends, or -1: it goes on
// after the block.
template <typename T, int kLanes>
__device__ __forceinline__ int add_heads(const Room<T, kLanes>& room, int walker, RowSum& sum) {
  for (; walker < kBlock / kLanes; ++walker) {
    room.heads.add_to(sum, walker);
    if (room.head_end[walker] >= 0) return room.head_end[walker];
  }
  return -1;
}

}  // namespace widedeep::kernels
