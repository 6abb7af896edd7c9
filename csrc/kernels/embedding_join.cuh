// The second kernel of the embeddings' backward pass: it adds the parts of rows that cross blocks and finishes them.
// Included by embedding_backward.cu alone.
#pragma once
#include "kernels/embedding_parts.cuh"

namespace widedeep::kernels {

// It is launched as soon as every block of the first kernel has begun (programmatic dependent launch), and looks up its
// rows while those end. What was written before the first kernel is there by then, and of what the first one writes
// nothing is read before the wait: the optimizers' state of a row belongs to the kernel that finishes it. Every thread
// waits, whether it has a row or not: a grid that ended before the first kernel would let the next one in the stream
// begin too early. That next one is launched in the usual way and begins when this grid has ended.
__device__ __forceinline__ void wait_for_chunks() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ void let_join_begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Launches it so where the code that runs does wait: that is asked of the code, not of the GPU, which may be newer than
// the PTX that it runs.
template <typename... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                         const Parameters&... arguments) {
  cudaFuncAttributes code{};
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// One past the last sorted entry of the row. The lanes of a warp search together: a fifth of the steps of a search by
// halves, each of which waits for memory.
__device__ inline int64_t end_of_row(const Segments& s, int32_t distinct, int32_t row) {
  int64_t low = 0, high = distinct;  // unique[low] <= row < unique[high]
  while (low + 1 < high) {
    const int64_t step = (high - low + 31) / 32, at = low + step * (threadIdx.x % 32 + 1);
    const bool not_after = at < high && s.unique[at] <= row;
    low += step * __popc(__ballot_sync(0xffffffffu, not_after));
    high = low + step < high ? low + step : high;
  }
  return s.offsets[low + 1];
}

// Each walker looks at one block. Where a row begins in it and goes on, the walker adds the row's parts if they are no
// more than its lanes; else all walkers add them, every so many parts each, and it adds what they have.
template <int kLanes, typename Sink>
__global__ void __launch_bounds__(kBlock, 3)
    join_kernel(Batch batch, const __grid_constant__ Features features, Segments s, Sink sink, Parts parts) {
  constexpr int kWalkers = kBlock / kLanes;
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kLanes);
  using Sums = WalkerSums<kLanes>;
  extern __shared__ Column columns[];
  __shared__ Sums sums;
  __shared__ int64_t long_counts[kWalkers];  // parts of each walker's row, where all walkers add them; else 0
  const int walker = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t first_block = int64_t{blockIdx.x} * kWalkers, block = first_block + walker;
  const int64_t last = (block + 1) * kBlock - 1;
  const Sorted sorted{s.entries, s.keys, batch.B * features.K};
  const SortedId id = sorted.at(last), id_before = sorted.at(last - kBlock);
  const SortedId id_after = sorted.at((block + 1 + lane) * kBlock);
  if (sink.idle()) {
    wait_for_chunks();
    return;
  }
  fill_columns(features, columns);
  __syncthreads();
  const bool reaches = id.row >= 0 && id.row == id_after.row;
  const uint32_t reached = __ballot_sync(0xffffffffu, reaches) >> (threadIdx.x % 32 - lane) & kMask;  // blocks after
  const bool open = (reached & 1) && id.row != id_before.row, is_long = open && reached == kMask;
  Target target{};
  WideState state{};
  int feature = 0;
  if (open) {
    feature = columns[id.entry % features.K];
    target = sink.place(features.feature[feature], feature, id.row);
    target.decay = sink.decay(target.flat);
    state = sink.wide_state(target.flat);
  }
  int64_t count = 0;
#pragma unroll
  for (int w = 0; w < 32 / kLanes; ++w) {  // the lanes of both walkers of a warp search together
    const int32_t row = __shfl_sync(0xffffffffu, is_long ? id.row : -1, w * kLanes);
    if (row < 0) continue;
    const int64_t end = end_of_row(s, s.table_start[features.count], row);
    if (threadIdx.x % 32 / kLanes == w) count = (end - 1) / kBlock - block + 1;
  }
  if (lane == 0) long_counts[walker] = count;
  __syncthreads();  // every lane has asked for its target
  wait_for_chunks();
  const auto finish = [&](const RowSum& sum) {
    const Feature& t = features.feature[feature];
    sink.template finish<kLanes>(t, target, sum, rows_packed(t));
    if (lane == 0) sink.finish_wide(target.flat, sum.wide, state);
  };
  if (open && !is_long) {
    RowSum sum{};
    add_parts<kLanes>(parts, block, 0, 1, 1 + __popc(reached), sum);
    finish(sum);
  }
  for (int w = 0; w < kWalkers; ++w) {
    if (long_counts[w] == 0) continue;
    RowSum sum{};
    add_parts<kLanes>(parts, first_block + w, walker, kWalkers, long_counts[w], sum);
    sums.store(sum);
    __syncthreads();
    if (walker == w) {
      RowSum all{};
      for (int other = 0; other < kWalkers; ++other) sums.add_to(all, other);
      finish(all);
    }
    __syncthreads();
  }
}

}  // namespace widedeep::kernels
