// bfloat16: the upper half of a float, rounded to nearest, ties to even.
#pragma once
#include <bit>
#include <cstdint>

struct alignas(2) __nv_bfloat16 {
  uint16_t bits = 0;
};

inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const auto word = std::bit_cast<uint32_t>(v);
  if ((word & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((word + 0x7FFFu + (word >> 16 & 1)) >> 16)};
}
