// Arithmetic on pairs of halves, and on bytes, in one register. Semantics: PTX ISA 8. Included by gemm_sm90_rows.cuh
// alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace widedeep::kernels::sm90 {

// Two floats rounded to nearest, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float lower, float upper) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}

// The same; negative ones become 0, NaN stays.
template <typename T>
__device__ __forceinline__ uint32_t pack_relu(float lower, float upper) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  else
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}

// The sums of both halves, rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sums;
  if constexpr (std::is_same_v<T, __half>)
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  else
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  return sums;
}

// Byte i of the result: bit 7 of byte s % 8 of `bytes`, eight times, where s >= 8 is hexadecimal digit i of
// `selectors`.
__device__ __forceinline__ uint32_t spread_byte_signs(uint32_t bytes, uint32_t selectors) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bytes), "r"(selectors));
  return mask;
}

// The lower bytes of both halves of `a`, then of `b`.
__device__ __forceinline__ uint32_t join_bytes(uint32_t a, uint32_t b) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, 0x6420;" : "=r"(bytes) : "r"(a), "r"(b));
  return bytes;
}

// 1 in each half that is not 0.
__device__ __forceinline__ uint32_t ones(uint32_t pair) {
  uint32_t result;
  asm("min.u16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0x00010001u));
  return result;
}

}  // namespace widedeep::kernels::sm90
