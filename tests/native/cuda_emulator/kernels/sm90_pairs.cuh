// The functions of csrc/kernels/sm90_pairs.cuh, written from the PTX manual and not from that file.
#pragma once
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace widedeep::kernels::sm90 {

template <typename T>
uint32_t pack(float lower, float upper) {
  const auto half = [](float v) {
    return std::is_same_v<T, __half> ? uint32_t{__float2half_rn(v).bits} : uint32_t{__float2bfloat16_rn(v).bits};
  };
  return half(lower) | half(upper) << 16;
}

template <typename T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const auto value = [](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    if constexpr (std::is_same_v<T, __half>)
      return __half2float({half});
    else
      return __bfloat162float({half});
  };
  return pack<T>(value(a) + value(b), value(a >> 16) + value(b >> 16));
}

template <typename T>
uint32_t pack_relu(float lower, float upper) {
  return pack<T>(lower < 0.f ? 0.f : lower, upper < 0.f ? 0.f : upper);
}

inline uint32_t spread_byte_signs(uint32_t bytes, uint32_t selectors) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15;
    if (selector < 8 || selector > 11) emulator::fail("spread_byte_signs: expected selectors of signs of four bytes");
    if (bytes >> (selector % 8 * 8 + 7) & 1) mask |= 0xFFu << (8 * i);
  }
  return mask;
}

inline uint32_t join_bytes(uint32_t a, uint32_t b) {
  return (a & 0xFF) | (a >> 16 & 0xFF) << 8 | (b & 0xFF) << 16 | (b >> 16 & 0xFF) << 24;
}

inline uint32_t ones(uint32_t pair) { return (pair & 0xFFFFu ? 1u : 0u) | (pair >> 16 ? 0x10000u : 0u); }

}  // namespace widedeep::kernels::sm90
