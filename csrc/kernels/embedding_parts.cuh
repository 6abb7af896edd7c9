// What the kernels of the embeddings' backward pass share: which row a sorted entry names, what a block keeps of its
// entries, and the parts of rows that reach beyond a walker or a block.
#pragma once
#include "kernels/embedding_sinks.cuh"

namespace widedeep::kernels {

constexpr int kBlock = 256;  // threads of a block, and the sorted entries that it takes

// Parts of rows that reach beyond a block [blocks, stride]: head: it began before the block; tail: it goes on after it.
struct Parts {
  float *head, *tail;
  int wide_at, stride;  // the row, padded to a multiple of four, then at wide_at its wide sum
};

// Which feature each id column belongs to. To be read after a barrier.
using Column = uint8_t;
static_assert(kMaxFeatures <= 256);

__device__ inline void fill_columns(const Features& features, Column* columns) {
  for (int f = threadIdx.x; f < features.count; f += kBlock)
    for (int h = 0; h < features.feature[f].hotness; ++h)
      columns[features.feature[f].first_id + h] = static_cast<Column>(f);
}

// An id in sorted order: its position in ids and its flat row; both -1 where there is none.
struct SortedId {
  int32_t entry, row;
};

struct Sorted {
  const int32_t *entries, *keys;
  int64_t n;

  // Two loads that do not wait for each other, anywhere before or after the ids too.
  __device__ __forceinline__ SortedId at(int64_t i) const {
    const bool there = i >= 0 && i < n;
    const int32_t entry = there ? entries[i] : -1, key = there ? keys[i] : -1;
    return {entry, entry < 0 ? -1 : key};
  }
};

// 1 / the number of valid ids of the sample, for features that take the mean; 1 otherwise.
__device__ inline float share(const Feature& t, const int32_t* ids) {
  if (!t.mean || t.hotness == 1) return 1.f;
  int valid = 0;
  for (int h = 0; h < t.hotness; ++h) valid += ids[t.first_id + h] >= 0;
  return 1.f / valid;
}

// What a walker needs to know of an entry, in one load of shared memory.
struct alignas(16) Entry {
  int64_t source;  // of its gradient in dx
  float weight;
  int16_t dim;  // 0 where there is no entry
  uint8_t feature, packed;
};

// Parts of a row, one for each walker of a block.
template <int kLanes>
struct WalkerSums {
  Pack<float, 4> deep[kBlock / kLanes][kGroups][kLanes];
  float wide[kBlock / kLanes];

  __device__ __forceinline__ void store(const RowSum& sum) {
    const int walker = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float (&v)[4] = sum.deep[group];
      deep[walker][group][lane] = {{v[0], v[1], v[2], v[3]}};
    }
    if (lane == 0) wide[walker] = sum.wide;
  }

  __device__ __forceinline__ void add_to(RowSum& sum, int walker) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Pack<float, 4> part = deep[walker][group][threadIdx.x % kLanes];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.deep[group][e] += part.v[e];
    }
    sum.wide += wide[walker];
  }
};

template <int kLanes>
__device__ __forceinline__ void store_part(const Parts& parts, float* part, const RowSum& sum) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int column = column_of<kLanes>(group);
    const float (&v)[4] = sum.deep[group];
    store4(part + column, Pack<float, 4>{{v[0], v[1], v[2], v[3]}}, parts.wide_at - column, true);
  }
  if (threadIdx.x % kLanes == 0) part[parts.wide_at] = sum.wide;
}

// Adds every `step`-th part of the row that begins in `block`, from part `from` on: part 0 is the block's tail, part j
// the head of the j-th block after it. Four are loaded together.
template <int kLanes>
__device__ __forceinline__ void add_parts(const Parts& parts, int64_t block, int64_t from, int step, int64_t count,
                                          RowSum& sum) {
  constexpr int kTogether = 4;
  for (int64_t first = from; first < count; first += kTogether * step) {
    Pack<float, 4> ahead[kTogether][kGroups];
    float wide[kTogether];
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
      const int64_t part = first + a * step;
      const bool there = part < count;
      const float* source = (part == 0 ? parts.tail : parts.head) + (block + part) * parts.stride;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int column = column_of<kLanes>(group);
        ahead[a][group] = load4(source + column, there ? parts.wide_at - column : 0, true);
      }
      wide[a] = there ? source[parts.wide_at] : 0.f;
    }
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.deep[group][e] += ahead[a][group].v[e];
      sum.wide += wide[a];
    }
  }
}

}  // namespace widedeep::kernels
