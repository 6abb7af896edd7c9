// Single-precision matrix product C = A B with packed panels (Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008), for the hidden layers: forward x W^T, dgrad dz W, wgrad dz^T x. Operands of a half
// type become float as they are packed.
#pragma once
#include <cstdint>
#include <functional>

#include "core/dtype.h"

namespace widedeep::cpu {

// A row-major matrix, or the transpose of one: element (i, j) is data[i * stride + j], or data[j * stride + i].
struct MatrixView {
  const void* data;
  core::DType type;
  int64_t stride;
  bool transposed;
};

// A finished piece of C, still hot in cache: rows [row, row + rows) and columns [column, column + columns); `block`
// numbers its row block. `column` is a multiple of kTileColumns. Called once per piece, from whichever thread computed
// it.
inline constexpr int kTileColumns = 128;
struct Tile {
  float* c;
  int64_t stride, row, rows, column, columns, block;
};
using Epilogue = std::function<void(const Tile&)>;

// C[M, N] = A[M, K] B[K, N], then `epilogue` (may be empty) on every tile. C is row-major with rows `stride` apart and
// must not overlap A or B; null: C lives in scratch memory, where the epilogue finds it. K == 0 gives zeros. The sum
// over K of an element is taken in an order that depends on K alone, so the bits of C do not depend on the number of
// threads.
void gemm(int64_t M, int64_t N, int64_t K, MatrixView a, MatrixView b, float* c, int64_t stride,
          const Epilogue& epilogue = {});

int64_t gemm_blocks(int64_t M);   // row blocks: a function of M alone
const char* gemm_instructions();  // which of the variants of gemm_kernel.h was compiled, in words

// Memory that grows and stays: at least `floats` floats, 64-byte aligned, private to the calling thread and this slot.
float* gemm_scratch(int slot, int64_t floats);

}  // namespace widedeep::cpu
