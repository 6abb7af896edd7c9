// The one driver function that the kernels ask for, with the limits of its manual page for two dimensions.
#pragma once
#include "cuda.h"

using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                  const cuuint64_t* size, const cuuint64_t* pitch, const cuuint32_t* box,
                                  const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const cuuint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4 : 2;
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && pitch[0] % 16 == 0 &&
                    pitch[0] < uint64_t{1} << 40 && step[0] == 1 && step[1] == 1 && box[0] * element == 128 &&
                    swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[1] >= 1 && box[1] <= 256 && size[0] >= 1 &&
                    size[1] >= 1 && size[0] <= uint64_t{1} << 32 && size[1] <= uint64_t{1} << 32;
  if (!fits || reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(base), size[0], size[1], pitch[0], box[0], box[1], element};
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** symbol, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorNotSupported;
  *symbol = reinterpret_cast<void*>(&encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return emulator_answer();
}
