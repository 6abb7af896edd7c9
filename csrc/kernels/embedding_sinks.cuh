// What becomes of a touched row once its gradient is summed: a walker of kLanes lanes finishes the deep part together,
// one thread the wide weight. Included by embedding_parts.cuh alone.
#pragma once
#include "core/rmsprop.h"
#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace widedeep::kernels {

// A lane holds kGroups times four neighbouring columns of a row. Those of one group lie side by side over the lanes, so
// that 16-byte accesses to a row of floats cover whole sectors.
constexpr int kGroups = 2;

template <int kLanes>
__device__ __forceinline__ int column_of(int group) {
  return (group * kLanes + static_cast<int>(threadIdx.x) % kLanes) * 4;
}

struct RowSum {
  float deep[kGroups][4], wide;
};

// Where a finished row is, and what its rms decays by before this step.
struct Target {
  int32_t in_table, flat;
  float decay;
};

// What FTRL keeps of a row.
struct WideState {
  float weight, accum, linear;
};

// Four neighbours at p, of which `left` are inside the row: zeros for the others.
template <typename T>
__device__ __forceinline__ Pack<T, 4> load4(const T* p, int left, bool packed) {
  if (packed) return left > 0 ? *reinterpret_cast<const Pack<T, 4>*>(p) : Pack<T, 4>{};
  Pack<T, 4> values{};
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < left) values.v[e] = p[e];
  return values;
}

template <typename T>
__device__ __forceinline__ void store4(T* p, const Pack<T, 4>& values, int left, bool packed) {
  if (packed) {
    if (left > 0) *reinterpret_cast<Pack<T, 4>*>(p) = values;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < left) p[e] = values.v[e];
}

__device__ __forceinline__ bool aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Whether every row of the table is whole packs of four.
__device__ __forceinline__ bool rows_packed(const Feature& t) {
  return t.dim % 4 == 0 && aligned(t.table, 16) && aligned(t.rms, 16);
}

// Applies both optimizers to a finished row.
struct Update {
  RowUpdate p;

  __device__ bool idle() const { return p.found_inf && *p.found_inf != 0.f; }

  __device__ Target place(const Feature& t, int32_t, int32_t row) const { return {row - t.row_base, row, 1.f}; }

  // These read what finish_wide overwrites: all who ask must have asked before.
  __device__ float decay(int32_t row) const { return core::rmsprop_catch_up(*p.step, p.last_step[row], p.rho); }
  __device__ WideState wide_state(int32_t row) const { return {p.wide[row], p.accum[row], p.linear[row]}; }

  template <int kLanes, int kUsed = kGroups>
  __device__ __forceinline__ void finish(const Feature& t, const Target& target, const RowSum& sum, bool packed) const {
    const int64_t at = int64_t{target.in_table} * t.dim;
    const core::RmspropRule rule{*p.lr, p.rho, p.eps};
    Pack<float, 4> weights[kUsed], rms[kUsed];
#pragma unroll
    for (int group = 0; group < kUsed; ++group) {
      const int column = column_of<kLanes>(group);
      weights[group] = load4(t.table + at + column, t.dim - column, packed);
      rms[group] = load4(t.rms + at + column, t.dim - column, packed);
    }
#pragma unroll
    for (int group = 0; group < kUsed; ++group) {
      const int column = column_of<kLanes>(group);
      if (column >= t.dim) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        core::rmsprop(weights[group].v[e], rms[group].v[e], sum.deep[group][e], target.decay, rule);
      store4(t.table + at + column, weights[group], t.dim - column, packed);
      store4(t.rms + at + column, rms[group], t.dim - column, packed);
    }
  }

  __device__ void finish_wide(int32_t flat, float sum, WideState state) const {
    p.last_step[flat] = static_cast<int32_t>(*p.step);
    core::ftrl(state.weight, state.accum, state.linear, sum, p.ftrl);
    p.wide[flat] = state.weight;
    p.accum[flat] = state.accum;
    p.linear[flat] = state.linear;
  }
};

// Stores the sums of a finished row where the order of `unique` puts them.
struct Store {
  const int32_t *unique, *table_start;
  int32_t distinct_at;  // index of U in table_start
  float* wide;

  __device__ bool idle() const { return false; }

  __device__ float decay(int32_t) const { return 1.f; }
  __device__ WideState wide_state(int32_t) const { return {}; }

  __device__ Target place(const Feature&, int32_t feature, int32_t row) const {
    int32_t low = table_start[feature], high = table_start[distinct_at];
    const int32_t first = low;
    while (low + 1 < high) {  // unique[low] <= row < unique[high]
      const int32_t middle = low + (high - low) / 2;
      (unique[middle] <= row ? low : high) = middle;
    }
    return {low - first, low, 1.f};
  }

  template <int kLanes, int kUsed = kGroups>
  __device__ __forceinline__ void finish(const Feature& t, const Target& target, const RowSum& sum, bool packed) const {
    float* const row = t.table + int64_t{target.in_table} * t.dim;
#pragma unroll
    for (int group = 0; group < kUsed; ++group) {
      const int column = column_of<kLanes>(group);
      const float (&v)[4] = sum.deep[group];
      store4(row + column, Pack<float, 4>{{v[0], v[1], v[2], v[3]}}, t.dim - column, packed);
    }
  }

  __device__ void finish_wide(int32_t flat, float sum, WideState) const { wide[flat] = sum; }
};

}  // namespace widedeep::kernels
