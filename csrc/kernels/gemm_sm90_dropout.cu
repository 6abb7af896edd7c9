// What dropout keeps, drawn ahead of the products. There the random numbers would cost more: every instruction beside a
// product delays it (docs/cuda.md).
#include <algorithm>

#include "kernels/gemm_sm90_draw.cuh"

namespace widedeep::kernels {
namespace {

using namespace sm90;

constexpr int kThreads = 256;

struct List {
  KeepSm90 item[kSm90Links];
};

// A warp draws the bits of kGroupRows rows and of the columns that are handed over together; blockIdx.y is the layer.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dropout_keep_kernel(const __grid_constant__ List list, int strips, DropoutArgs args) {
  const KeepSm90& layer = list.item[blockIdx.y];
  const core::Dropout drop = dropout_of(args, static_cast<uint64_t>(*args.step), blockIdx.y);
  const auto tiles_n = static_cast<int>((layer.N + kColumns - 1) / kColumns);
  const int64_t parts = int64_t{strips} * tiles_n * (2 * kTurns<T>);
  const uint32_t lane = threadIdx.x % 32;
  for (int64_t part = global_thread() / 32; part < parts; part += grid_threads() / 32) {
    const int turn = static_cast<int>(part) % kTurns<T>, group = static_cast<int>(part / kTurns<T>) % 2;
    const auto tile = static_cast<int>(part / (2 * kTurns<T>));
    const int strip = tile / tiles_n, tile_n = tile - strip * tiles_n;
    const uint32_t column = tile_n * kColumns + turn * kHanded<T> + lane * kLane<T>;
    uint32_t row = args.first_row + static_cast<uint32_t>(strip * kRows + group * kGroupRows);
    Bits<T>* keep = static_cast<Bits<T>*>(layer.keep) + bits_at<T>(strip, tiles_n, tile_n, group, turn, 0) + lane;
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block, row += kTogether, keep += 32) *keep = draw<T>(drop, row, column);
  }
}

template <typename T>
cudaError_t launch(const List& list, int count, int64_t strips, DropoutArgs dropout, cudaStream_t stream) {
  int64_t most = 0;  // tiles of a layer
  for (int i = 0; i < count; ++i) most = std::max(most, strips * ceil_div(list.item[i].N, kColumns));
  // A part a warp: many blocks that end soon share what another kernel leaves, few that last would crowd where there
  // was room first.
  const dim3 grid(static_cast<unsigned>(ceil_div(most * 2 * kTurns<T>, kThreads / 32)), static_cast<unsigned>(count));
  dropout_keep_kernel<T><<<grid, kThreads, 0, stream>>>(list, static_cast<int>(strips), dropout);
  return cudaGetLastError();
}

}  // namespace

cudaError_t dropout_keep_sm90(const KeepSm90* layers, int count, int64_t M, core::DType dtype, DropoutArgs dropout,
                              cudaStream_t stream) {
  if (count < 1 || count > kSm90Links || M > INT32_MAX - 256) return cudaErrorInvalidValue;
  if (M == 0) return cudaSuccess;
  List list{};
  for (int i = 0; i < count; ++i) {
    if (sm90_strips(M) * ceil_div(layers[i].N, kColumns) > INT32_MAX / 4) return cudaErrorInvalidValue;
    list.item[i] = layers[i];
  }
  return dtype == core::DType::f32 ? launch<float>(list, count, sm90_strips(M), dropout, stream)
                                   : launch<__half>(list, count, sm90_strips(M), dropout, stream);
}

}  // namespace widedeep::kernels
