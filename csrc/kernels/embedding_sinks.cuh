// What becomes of a touched row once its gradient is summed. A warp finishes a row together: lane l holds the columns
// l + 32 c of the sum. Included by embedding_backward.cu alone.
#pragma once
#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace widedeep::kernels {

// Applies both optimizers to a finished row.
struct Update {
  RowUpdate p;

  __device__ bool idle() const { return p.found_inf && *p.found_inf != 0.f; }

  template <int kColumns>
  __device__ void finish(const Feature& t, int32_t row, const float (&sum)[kColumns], float wide_sum) const {
    const int lane = threadIdx.x % 32;
    const int64_t at = int64_t{row - t.row_base} * t.dim;
    const core::RmspropRule rule{*p.lr, p.rho, p.eps};
    const float decay = core::rmsprop_catch_up(*p.step, p.last_step[row], p.rho);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane + 32 * c;
      if (column < t.dim) core::rmsprop(t.table[at + column], t.rms[at + column], sum[c], decay, rule);
    }
    __syncwarp();  // every lane has read last_step
    if (lane == 0) {
      p.last_step[row] = static_cast<int32_t>(*p.step);
      core::ftrl(p.wide[row], p.accum[row], p.linear[row], wide_sum, p.ftrl);
    }
  }
};

// Stores the sums of a finished row where the order of `unique` puts them.
struct Store {
  const int32_t *unique, *table_start;
  int32_t distinct_at;  // index of U in table_start
  float* wide;

  __device__ bool idle() const { return false; }

  template <int kColumns>
  __device__ void finish(const Feature& t, int32_t row, const float (&sum)[kColumns], float wide_sum) const {
    int32_t low = 0, high = table_start[distinct_at];
    while (low + 1 < high) {  // unique[low] <= row < unique[high]
      const int32_t middle = (low + high) / 2;
      (unique[middle] <= row ? low : high) = middle;
    }
    const int lane = threadIdx.x % 32;
    int32_t first = 0;  // where this table's rows start: the first unique row not below row_base
    int32_t end = low;
    while (first < end) {
      const int32_t middle = (first + end) / 2;
      if (unique[middle] < t.row_base)
        first = middle + 1;
      else
        end = middle;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane + 32 * c;
      if (column < t.dim) t.table[int64_t{low - first} * t.dim + column] = sum[c];
    }
    if (lane == 0) wide[low] = wide_sum;
  }
};

}  // namespace widedeep::kernels
