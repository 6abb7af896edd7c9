// The storage types of activations as the CPU loops see them, and conversion of whole rows. float16 and bfloat16 travel
// as their bits; all arithmetic is in float.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"

namespace widedeep::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__aarch64__)
typedef __fp16 NativeHalf;  // g++ has _Float16 only from version 13 on there
#else
typedef _Float16 NativeHalf;
#endif

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_float(Half v) {
  NativeHalf half;
  std::memcpy(&half, &v.bits, sizeof half);
  return static_cast<float>(half);
}

inline void store(float v, float& out) { out = v; }
// Round to nearest even; a NaN stays one (quiet).
inline void store(float v, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}
inline void store(float v, Half& out) {
  const NativeHalf half = static_cast<NativeHalf>(v);
  std::memcpy(&out.bits, &half, sizeof out.bits);
}

template <typename T>
void load_row(const T* __restrict__ in, float* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

template <typename T>
void store_row(const float* __restrict__ in, T* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(in[i], out[i]);
}

#if defined(__F16C__)
// g++ 12 converts _Float16 one element at a time; F16C does eight.
template <>
inline void load_row<Half>(const Half* __restrict__ in, float* __restrict__ out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
template <>
inline void store_row<Half>(const float* __restrict__ in, Half* __restrict__ out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) store(in[i], out[i]);
}
#elif defined(__aarch64__)
// g++ 12 rounds to __fp16 one element at a time, but widens eight.
template <>
inline void store_row<Half>(const float* __restrict__ in, Half* __restrict__ out, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1_u16(reinterpret_cast<uint16_t*>(out + i), vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
  for (; i < n; ++i) store(in[i], out[i]);
}
#endif

// Calls f with a null pointer of the storage type: visit(dtype, [&](auto* t) { using T =
// std::remove_pointer_t<decltype(t)>; ... }).
template <typename F>
void visit(core::DType dtype, const F& f) {
  switch (dtype) {
    case core::DType::f32:
      return f(static_cast<float*>(nullptr));
    case core::DType::f16:
      return f(static_cast<Half*>(nullptr));
    case core::DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace widedeep::cpu
