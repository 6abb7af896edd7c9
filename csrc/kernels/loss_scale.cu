#include "core/loss_scale.h"
#include "kernels/common.cuh"
#include "kernels/loss_scale.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 256;

// Whether a 32-bit word holds an infinity or a NaN: a whole float, or either of two half values.
__device__ __forceinline__ bool bad_word(uint32_t word, core::DType type) {
  if (type == core::DType::f32) return (word & 0x7F800000u) == 0x7F800000u;
  const uint32_t exponent = type == core::DType::f16 ? 0x7C00u : 0x7F80u;
  return (word & exponent) == exponent || (word >> 16 & exponent) == exponent;
}

// The first `vectors` 16-byte pieces of values as such, the elements from `first_single` on one by one.
__global__ void __launch_bounds__(kThreads) check_finite_kernel(const void* values, core::DType type, int64_t vectors,
                                                                int64_t first_single, int64_t n, float* found_inf) {
  bool bad = false;
#pragma unroll 4
  for (int64_t i = global_thread(); i < vectors; i += grid_threads()) {
    const uint4 v = static_cast<const uint4*>(values)[i];
    bad |= bad_word(v.x, type) || bad_word(v.y, type) || bad_word(v.z, type) || bad_word(v.w, type);
  }
  for (int64_t i = first_single + global_thread(); i < n; i += grid_threads()) bad |= !isfinite(load(values, type, i));
  if (bad) *found_inf = 1.f;  // every writer writes the same
}

__global__ void loss_scale_kernel(float* scale, int32_t* good_steps, int64_t* updates, const float* found_inf,
                                  float growth, float backoff, int64_t interval) {
  core::update_loss_scale(*scale, *good_steps, *updates, *found_inf != 0.f, growth, backoff, interval);
}

}  // namespace

cudaError_t check_finite(const void* values, core::DType type, int64_t n, float* found_inf, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t lanes = 16 / core::bytes_of(type);
  const int64_t vectors = reinterpret_cast<uintptr_t>(values) % 16 == 0 ? n / lanes : 0;
  const int grid = grid_for(vectors > 0 ? vectors : n, kThreads, 132 * 8);
  check_finite_kernel<<<grid, kThreads, 0, stream>>>(values, type, vectors, vectors * lanes, n, found_inf);
  return cudaGetLastError();
}

cudaError_t loss_scale_update(float* scale, int32_t* good_steps, int64_t* updates, const float* found_inf, float growth,
                              float backoff, int64_t interval, cudaStream_t stream) {
  loss_scale_kernel<<<1, 1, 0, stream>>>(scale, good_steps, updates, found_inf, growth, backoff, interval);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
