// Small pieces that every kernel family uses. No torch here, ever.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over n items: enough to fill any current GPU several times, never past the grid limit.
inline int grid_for(int64_t n, int block, int64_t most = 132 * 32) {
  const int64_t blocks = ceil_div(n, block);
  return static_cast<int>(blocks < most ? blocks : most);
}

__device__ __forceinline__ int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t(gridDim.x) * blockDim.x; }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// An element of a storage type that is known at run time only.
__device__ __forceinline__ float load(const void* values, core::DType type, int64_t i) {
  switch (type) {
    case core::DType::f32:
      return static_cast<const float*>(values)[i];
    case core::DType::f16:
      return to_float(static_cast<const __half*>(values)[i]);
    default:
      return to_float(static_cast<const __nv_bfloat16*>(values)[i]);
  }
}

__device__ __forceinline__ void store(void* values, core::DType type, int64_t i, float v) {
  switch (type) {
    case core::DType::f32:
      static_cast<float*>(values)[i] = v;
      break;
    case core::DType::f16:
      static_cast<__half*>(values)[i] = from_float<__half>(v);
      break;
    default:
      static_cast<__nv_bfloat16*>(values)[i] = from_float<__nv_bfloat16>(v);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Bytes that a load or store of so many may expect its address to be a multiple of: 16 where there are more, which is
// what the ops ask of matrices. A compiler for GPUs with accesses of 32 bytes would take a promise of 32 at its word.
constexpr size_t access_alignment(size_t bytes) { return bytes < 16 ? bytes : 16; }

// T values that travel as one load or store (4, 8 or 16 bytes), or as several of 16.
template <typename T, int N>
struct alignas(access_alignment(sizeof(T) * N)) Pack {
  T v[N];
};

// N neighbours of a row at p, of which `left` are inside it: zeros for the others. One load where rows are whole packs
// (`packed`), which the caller knows from the row length.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p, int64_t left, bool packed) {
  if (packed) return left > 0 ? *reinterpret_cast<const Pack<T, N>*>(p) : Pack<T, N>{};
  Pack<T, N> values{};
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < left) values.v[e] = p[e];
  return values;
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& values, int64_t left, bool packed) {
  if (packed) {
    if (left > 0) *reinterpret_cast<Pack<T, N>*>(p) = values;
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < left) p[e] = values.v[e];
}

template <typename T>
__device__ __forceinline__ Pack<T, 8> load8(const T* p, int64_t left, bool packed) {
  return load_pack<8>(p, left, packed);
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const Pack<T, 8>& values, int64_t left, bool packed) {
  store_pack(p, values, left, packed);
}

}  // namespace widedeep::kernels
