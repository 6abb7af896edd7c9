// How a block of the embeddings' backward pass looks up its sorted entries and sums the rows that lie in it. Included
// by embedding_backward.cu alone.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "kernels/embedding_parts.cuh"

namespace widedeep::kernels {

// Packs of gradients that each thread has in flight: of as many entries where rows need one group, else of half.
template <typename T>
constexpr int kPacks = 16 / sizeof(T);

// What a block of the first kernel keeps in shared memory.
template <typename T, int kLanes>
struct Room {
  Entry entries[kBlock];
  Target targets[kBlock];  // of rows that end at the entry and are finished by the block
  WideState wide_state[kBlock];
  float dlogit[kBlock];
  float wide[kBlock];  // sums of these rows
  WalkerSums<kLanes> heads;
  Pack<T, 4> gradients[kPacks<T>][kBlock];  // each thread's own, of the next entries
  int32_t head_end[kBlock / kLanes];        // the entry at which a walker's head ends, or -1: it goes on
};

// A walker's chunk; bit l is its entry l.
struct Chunk {
  uint32_t valid, starts, ends;  // there is an entry; a row starts there; a row ends there
  uint32_t finished;             // a row ends there that the block finishes

  __device__ bool head() const { return (valid & ~starts & 1) != 0; }
  // Where rows end that also begin in the chunk.
  __device__ uint32_t whole() const { return starts ? ends & (0u - (starts & (0u - starts))) : 0; }
};

// The first load of a block: each thread's id, and of some threads one more: the first and last lane of a warp take its
// neighbours, the second lane the id before the block.
struct Loaded {
  SortedId own, other;
};

__device__ __forceinline__ Loaded load_ids(const Sorted& sorted, int64_t block) {
  const int lane = threadIdx.x % 32;
  const int64_t i = block * kBlock + threadIdx.x;
  const int64_t other = lane == 0 ? i - 1 : lane == 1 ? block * kBlock - 1 : lane == 31 ? i + 1 : -1;
  return {sorted.at(i), sorted.at(other)};
}

// Where the gradient of an entry is. -1 has none: it is copied as zeros beside whole packs.
template <typename T>
__device__ __forceinline__ Entry describe_entry(const Batch& batch, const Features& features, const Column* columns,
                                                const Gradients& g, int32_t entry) {
  const bool packs = g.W % 4 == 0 && aligned(g.dx, 4 * sizeof(T));
  if (entry < 0) return {0, 0.f, 0, 0, packs};
  const int32_t sample = entry / features.K;
  const uint8_t feature = columns[entry % features.K];
  const Feature& t = features.feature[feature];
  const float inverse = g.grad_scale ? 1.f / *g.grad_scale : 1.f;
  return {int64_t{sample} * g.W + t.column, inverse * share(t, batch.ids + int64_t{sample} * features.K),
          static_cast<int16_t>(t.dim), feature, packs && t.column % 4 == 0 && rows_packed(t)};
}

// Where rows begin and end; targets, without their decay.
template <int kLanes, typename T, typename Sink>
__device__ __forceinline__ Chunk place_rows(const Features& features, const Sink& sink, const Loaded& loaded,
                                            Room<T, kLanes>& room) {
  const int lane = threadIdx.x % 32;
  const int32_t row = loaded.own.row, other = loaded.other.row;
  int32_t before = __shfl_up_sync(0xffffffffu, row, 1), after = __shfl_down_sync(0xffffffffu, row, 1);
  const int32_t before_block = __shfl_sync(0xffffffffu, other, 1);
  if (lane == 0) before = other;
  if (lane == 31) after = other;
  const bool valid = row >= 0, ends = valid && row != after, finished = ends && row != before_block;
  if (finished) {
    const int feature = room.entries[threadIdx.x].feature;
    room.targets[threadIdx.x] = sink.place(features.feature[feature], feature, row);
  }
  const int shift = lane / kLanes * kLanes;
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kLanes);
  const auto chunk_bits = [=](bool value) { return __ballot_sync(0xffffffffu, value) >> shift & kMask; };
  const uint32_t valid_bits = chunk_bits(valid), starts_bits = chunk_bits(valid && row != before);
  const uint32_t ends_bits = chunk_bits(ends);
  return {valid_bits, starts_bits, ends_bits, chunk_bits(finished)};
}

// What else each thread reads for its entry, while gradients come.
template <int kLanes, typename T, typename Sink>
__device__ __forceinline__ void load_wide(const Features& features, const Gradients& g, const Sink& sink, int32_t entry,
                                          bool finished, Room<T, kLanes>& room) {
  float dlogit = 0.f;
  if (entry >= 0) {
    const float inverse = g.grad_scale ? 1.f / *g.grad_scale : 1.f;
    dlogit = inverse * g.dlogit[entry / features.K];
  }
  if (finished) {
    Target& target = room.targets[threadIdx.x];
    const WideState state = sink.wide_state(target.flat);
    target.decay = sink.decay(target.flat);
    room.wide_state[threadIdx.x] = state;
  }
  room.dlogit[threadIdx.x] = dlogit;
}

__device__ __forceinline__ int chunk_first(int lanes) { return static_cast<int>(threadIdx.x) / lanes * lanes; }

// The gradients of entry `at` of the chunk begin to come, as one group of copies.
template <int kUsed, int kLanes, typename T>
__device__ __forceinline__ void fetch(const T* dx, Room<T, kLanes>& room, int at) {
  const Entry entry = room.entries[chunk_first(kLanes) + at];
#pragma unroll
  for (int group = 0; group < kUsed; ++group) {
    const int column = column_of<kLanes>(group);
    const bool there = column < entry.dim;
    Pack<T, 4>& to = room.gradients[at % (kPacks<T> / kUsed) * kUsed + group][threadIdx.x];
    __pipeline_memcpy_async(&to, there ? dx + entry.source + column : dx, sizeof(to), there ? 0 : sizeof(to));
  }
}

// Begins the copies that walk_packed<kUsed> waits for.
template <int kUsed, int kLanes, typename T>
__device__ __forceinline__ void begin_walk(const T* dx, Room<T, kLanes>& room) {
  static_assert(kPacks<T> / kUsed <= kLanes);
#pragma unroll 4
  for (int at = 0; at < kPacks<T> / kUsed; ++at) {
    fetch<kUsed>(dx, room, at);
    __pipeline_commit();
  }
}

// Adds entry `at` of the chunk, whose gradients are in `slot`.
template <int kUsed, int kLanes, typename T>
__device__ __forceinline__ void add_entry(const Room<T, kLanes>& room, int at, int slot, RowSum& sum) {
  const int in_block = chunk_first(kLanes) + at;
  sum.wide += room.dlogit[in_block];
  const float weight = room.entries[in_block].weight;
#pragma unroll
  for (int group = 0; group < kUsed; ++group) {
    const Pack<T, 4> gradient = room.gradients[slot * kUsed + group][threadIdx.x];
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.deep[group][e] += to_float(gradient.v[e]) * weight;
  }
}

// A row ends at entry `at` of the chunk: it is finished, or kept as the head where it began before the chunk.
template <int kUsed, int kLanes, typename T, typename Sink>
__device__ __forceinline__ void end_row(const Features& features, const Sink& sink, const Chunk& chunk, int at,
                                        bool packed, Room<T, kLanes>& room, RowSum& sum) {
  const int in_block = chunk_first(kLanes) + at;
  const bool first_lane = threadIdx.x % kLanes == 0;
  if (chunk.whole() >> at & 1) {
    const Feature& t = features.feature[room.entries[in_block].feature];
    sink.template finish<kLanes, kUsed>(t, room.targets[in_block], sum, packed || rows_packed(t));
    if (first_lane) room.wide[in_block] = sum.wide;
  } else {
    room.heads.store(sum);
    if (first_lane) room.head_end[threadIdx.x / kLanes] = in_block;
  }
  sum = {};
}

// Walks a chunk in order and finishes the rows that begin and end in it. Leaves the head in the room and what is open
// at the end in `sum`. Here all gradients and rows are whole packs, and their copies have begun. kUsed: groups that the
// rows of the warp need. Gradients come through shared memory, where a loop can index them: the many instructions that
// finish a row then stand here once, and copies, unlike loads, are in flight meanwhile without taking registers.
template <int kUsed, int kLanes, typename T, typename Sink>
__device__ __forceinline__ void walk_packed(const Features& features, const T* dx, const Sink& sink, const Chunk& chunk,
                                            Room<T, kLanes>& room, RowSum& sum) {
  constexpr int kSlots = kPacks<T> / kUsed;
#pragma unroll 1
  for (int at = 0; at < kLanes; ++at) {
    __pipeline_wait_prior(kSlots - 1);  // the thread's own copies: nobody else reads them
    add_entry<kUsed>(room, at, at % kSlots, sum);
    if (at + kSlots < kLanes) fetch<kUsed>(dx, room, at + kSlots);
    if (chunk.ends >> at & 1) end_row<kUsed>(features, sink, chunk, at, true, room, sum);
    __pipeline_commit();  // empty near the end, so that the number of groups to wait for stays
  }
}

// The same with single elements, which cannot be copied so: a few entries are loaded together, then added.
template <int kLanes, typename T, typename Sink>
__device__ __forceinline__ void walk_elements(const Features& features, const T* dx, const Sink& sink,
                                              const Chunk& chunk, Room<T, kLanes>& room, RowSum& sum) {
  constexpr int kTogether = kPacks<T> / kGroups;
#pragma unroll 1
  for (int first = 0; first < kLanes; first += kTogether) {
    Pack<T, 4> loaded[kTogether][kGroups];
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
      const Entry entry = room.entries[chunk_first(kLanes) + first + a];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int column = column_of<kLanes>(group);
        loaded[a][group] = load4(dx + entry.source + column, entry.dim - column, false);
      }
    }
#pragma unroll
    for (int a = 0; a < kTogether; ++a)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) room.gradients[a * kGroups + group][threadIdx.x] = loaded[a][group];
#pragma unroll 1
    for (int a = 0; a < kTogether; ++a) {
      add_entry<kGroups>(room, first + a, a, sum);
      if (chunk.ends >> (first + a) & 1) end_row<kGroups>(features, sink, chunk, first + a, false, room, sum);
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
