// Of the Hopper products: their tiles, and the order in which bits of a tile's elements are kept, one bit an element,
// in words of the lane that finishes them.
#pragma once
#include "kernels/common.cuh"

namespace widedeep::kernels::sm90 {

constexpr int kRows = 128, kColumns = 256;  // of a block's tile of C
constexpr int kGroupRows = 64;              // of which each of two warpgroups has half
constexpr int kCluster = 2;                 // blocks, one above the other
constexpr int kTogether = 8;                // rows that a warp finishes together: their loads overlap
constexpr int kBlocks = kGroupRows / kTogether;
constexpr int kRowBytes = 512;  // of a row handed over at a time
constexpr int kSlice = 128;     // bytes of a row of A and B in a stage of shared memory, one swizzle row

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;
template <typename T>
constexpr int kHanded = kRowBytes / static_cast<int>(sizeof(T));  // columns handed over at a time
template <typename T>
constexpr int kTurns = kColumns / kHanded<T>;
template <typename T>
constexpr int kLane = 16 / static_cast<int>(sizeof(T));  // columns of a lane

// A lane's bits of the rows that are finished together: byte c of word w belongs to column 4 w + c, its bit n to row n.
template <typename T>
using Bits = Pack<uint32_t, kHalf<T> ? 2 : 1>;

// Where the bits of a warp's block begin: of strip `strip` (128 rows) and column `tile_n` of tiles.
template <typename T>
__device__ __forceinline__ int64_t bits_at(int strip, int tiles_n, int tile_n, int group, int turn, int block) {
  const int64_t tile = int64_t{strip} * tiles_n + tile_n;
  return (((tile * 2 + group) * kTurns<T> + turn) * kBlocks + block) * 32;
}

}  // namespace widedeep::kernels::sm90
