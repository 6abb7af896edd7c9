// Transposed copies of matrices, as many as there are in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace widedeep::kernels {

// to [columns, rows] = from [rows, columns]^T, row-major and contiguous; they must not overlap.
struct Transposed {
  const void* from;
  void* to;
  int64_t rows, columns;
};

// Elements of 2 or 4 bytes. Bytes: each matrix read and written once.
cudaError_t transpose(const Transposed* matrices, int count, int element_bytes, cudaStream_t stream);

}  // namespace widedeep::kernels
