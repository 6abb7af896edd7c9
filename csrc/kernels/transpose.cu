// A block takes a tile of 64 x 64 through shared memory: pairs of neighbours are read along the rows of one matrix and
// written along those of the other.
#include "kernels/common.cuh"
#include "kernels/transpose.h"

namespace widedeep::kernels {
namespace {

constexpr int kTile = 64, kThreads = 256, kLines = kThreads / 32;
constexpr int kListed = 64;  // matrices of one launch: 64 x 32 bytes stay below the 4 KB every driver takes

struct List {
  Transposed matrix[kListed];
};

// Two neighbours of a row at p, of which `left` are inside it: zeros for the others.
template <typename T>
__device__ __forceinline__ Pack<T, 2> load2(const T* p, int64_t left, bool packed) {
  if (packed) return left > 0 ? *reinterpret_cast<const Pack<T, 2>*>(p) : Pack<T, 2>{};
  return {{left > 0 ? p[0] : T{}, left > 1 ? p[1] : T{}}};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) transpose_kernel(const __grid_constant__ List list) {
  __shared__ T tile[kTile][kTile + 4 / sizeof(T)];
  const Transposed& m = list.matrix[blockIdx.y];
  const int64_t across = (m.columns + kTile - 1) / kTile, down = (m.rows + kTile - 1) / kTile;
  if (blockIdx.x >= across * down) return;
  const int64_t row = blockIdx.x / across * kTile, column = blockIdx.x % across * kTile;
  const int line = threadIdx.x / 32, pair = threadIdx.x % 32 * 2;
  const T* const from = static_cast<const T*>(m.from) + row * m.columns + column + pair;
#pragma unroll
  for (int r = line; r < kTile; r += kLines) {
    const int64_t left = row + r < m.rows ? m.columns - column - pair : 0;
    const Pack<T, 2> v = load2(from + r * m.columns, left, m.columns % 2 == 0);
    tile[r][pair] = v.v[0], tile[r][pair + 1] = v.v[1];
  }
  __syncthreads();
  T* const to = static_cast<T*>(m.to) + column * m.rows + row + pair;
#pragma unroll
  for (int c = line; c < kTile; c += kLines) {
    const int64_t left = column + c < m.columns ? m.rows - row - pair : 0;
    T* const at = to + c * m.rows;
    const Pack<T, 2> v{{tile[pair][c], tile[pair + 1][c]}};
    if (m.rows % 2 == 0) {
      if (left > 0) *reinterpret_cast<Pack<T, 2>*>(at) = v;
    } else {
      if (left > 0) at[0] = v.v[0];
      if (left > 1) at[1] = v.v[1];
    }
  }
}

int64_t tiles_of(const Transposed& m) { return ceil_div(m.rows, kTile) * ceil_div(m.columns, kTile); }

}  // namespace

cudaError_t transpose(const Transposed* matrices, int count, int element_bytes, cudaStream_t stream) {
  for (int first = 0; first < count; first += kListed) {
    List list{};
    int64_t tiles = 0;
    const int listed = count - first < kListed ? count - first : kListed;
    for (int i = 0; i < listed; ++i) {
      list.matrix[i] = matrices[first + i];
      tiles = tiles_of(list.matrix[i]) > tiles ? tiles_of(list.matrix[i]) : tiles;
    }
    if (tiles == 0) continue;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(listed));
    if (element_bytes == 2)
      transpose_kernel<uint16_t><<<grid, kThreads, 0, stream>>>(list);
    else
      transpose_kernel<uint32_t><<<grid, kThreads, 0, stream>>>(list);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

}  // namespace widedeep::kernels
