// Descriptors for the bulk tensor copy engine. Host only.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

// Row-major matrix [rows, columns], read in boxes of box_rows x 128 bytes with the swizzle of that width; float32 is
// rounded to TF32 on the way. cuTensorMapEncodeTiled is asked of the runtime, so that the library links without
// libcuda.
inline cudaError_t tensor_map(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, uint32_t box_rows,
                              core::DType dtype) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (!encode) {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(symbol);
  }
  const auto type = dtype == core::DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                    : dtype == core::DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto bytes = static_cast<cuuint32_t>(core::bytes_of(dtype));
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * bytes};
  const cuuint32_t box[2] = {128 / bytes, box_rows}, step[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(matrix), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace widedeep::kernels
