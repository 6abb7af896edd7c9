// Element-wise rules as grid-stride loops; rmsprop_dense takes its list of tensors as a kernel parameter, a block row
// each.
#include "core/logistic.h"
#include "core/loss_scale.h"
#include "core/rmsprop.h"
#include "kernels/common.cuh"
#include "kernels/optim.h"

namespace widedeep::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kListed = 48;  // tensors of one launch: 48 x 72 bytes stay below the 4 KB every driver takes

struct List {
  DenseParameter parameter[kListed];
};

__device__ __forceinline__ bool skipped(const float* found_inf) { return found_inf && *found_inf != 0.f; }
__device__ __forceinline__ float inverse(const float* scale) { return scale ? 1.f / *scale : 1.f; }

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

__global__ void __launch_bounds__(kThreads) rmsprop_dense_kernel(const __grid_constant__ List list, DenseScalars s) {
  if (skipped(s.found_inf)) return;
  const DenseParameter& p = list.parameter[blockIdx.y];
  const core::RmspropRule rule{*s.lr, s.rho, s.eps};
  const float inverse_scale = inverse(s.grad_scale);
  const int64_t n = p.rows * p.columns;
  for (int64_t i = global_thread(); i < n; i += grid_threads()) {
    int64_t row = 0, column = i;
    if (p.rows > 1) {  // most weights have fewer than 2^32 elements, and their division is several times cheaper
      row = n <= UINT32_MAX ? static_cast<uint32_t>(i) / static_cast<uint32_t>(p.columns) : i / p.columns;
      column = i - row * p.columns;
    }
    const float g = load(p.grad, p.grad_type, row * p.grad_pitch + column) * inverse_scale;
    core::rmsprop(p.weight[i], p.rms[i], g, 1.f, rule);
    if (p.copy) store(p.copy, p.copy_type, row * p.copy_pitch + column, p.weight[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    ftrl_dense_kernel(float* weight, float* accum, float* linear, const float* __restrict__ grad, int64_t n,
                      core::FtrlRule rule, const float* grad_scale, const float* found_inf) {
  if (skipped(found_inf)) return;
  const float inverse_scale = inverse(grad_scale);
  for (int64_t i = global_thread(); i < n; i += grid_threads())
    core::ftrl(weight[i], accum[i], linear[i], grad[i] * inverse_scale, rule);
}

// A warp for each sorted place; the one where a row's run begins adds the run and updates the row.
template <typename Rule>
__global__ void __launch_bounds__(kThreads) listed_rows_kernel(ListedRows rows, Rule rule) {
  const int64_t i = global_thread() / 32;
  const int lane = threadIdx.x % 32;
  if (i >= rows.n) return;
  const uint32_t row = rows.sorted[i];
  if (row >= rows.R || (i > 0 && rows.sorted[i - 1] == row)) return;
  int64_t end = i + 1;
  while (end < rows.n && rows.sorted[end] == row) ++end;
  const auto state = rule.begin(row);
  for (int64_t column = lane; column < rows.D; column += 32) {
    float sum = 0.f;
    for (int64_t at = i; at < end; ++at) sum += rows.grads[rows.order[at] * rows.D + column];
    rule.apply(int64_t{row} * rows.D + column, sum, state);
  }
  __syncwarp();
  if (lane == 0) rule.end(row);
}

struct RmspropRows {
  float *weight, *rms;
  int32_t* last_step;
  const float* lr;
  const int64_t* step;
  float rho, eps;
  __device__ float begin(uint32_t row) const { return core::rmsprop_catch_up(*step, last_step[row], rho); }
  __device__ void apply(int64_t at, float g, float decay) const {
    core::rmsprop(weight[at], rms[at], g, decay, {*lr, rho, eps});
  }
  __device__ void end(uint32_t row) const { last_step[row] = static_cast<int32_t>(*step); }
};

struct FtrlRows {
  float *weight, *accum, *linear;
  core::FtrlRule rule;
  __device__ int begin(uint32_t) const { return 0; }
  __device__ void apply(int64_t at, float g, int) const { core::ftrl(weight[at], accum[at], linear[at], g, rule); }
  __device__ void end(uint32_t) const {}
};

__global__ void __launch_bounds__(kThreads)
    settle_kernel(float* rms, int32_t* last_step, int64_t rows, int64_t D, const int64_t* step, float rho) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = global_thread() / 32; row < rows; row += grid_threads() / 32) {
    const float decay = core::rmsprop_catch_up(*step + 1, last_step[row], rho);
    __syncwarp();
    for (int64_t column = lane; column < D; column += 32) rms[row * D + column] *= decay;
    if (lane == 0) last_step[row] = static_cast<int32_t>(*step);
  }
}

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

__global__ void __launch_bounds__(kThreads)
    auc_histogram_kernel(const float* __restrict__ logit, const float* __restrict__ label, int64_t B,
                         unsigned long long* positives, unsigned long long* negatives, int64_t bins) {
  for (int64_t b = global_thread(); b < B; b += grid_threads())
    atomicAdd((label[b] > 0.5f ? positives : negatives) + core::auc_bin(logit[b], bins),
              1ull);  // whole numbers: any order
}

template <typename Rule>
cudaError_t listed_rows(const ListedRows& rows, const Rule& rule, cudaStream_t stream) {
  if (rows.n == 0 || rows.D == 0) return cudaSuccess;
  listed_rows_kernel<<<static_cast<unsigned>(ceil_div(rows.n * 32, kThreads)), kThreads, 0, stream>>>(rows, rule);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rmsprop_dense(const DenseParameter* parameters, int count, const DenseScalars& scalars,
                          cudaStream_t stream) {
  for (int first = 0; first < count; first += kListed) {
    List list{};
    const int listed = count - first < kListed ? count - first : kListed;
    int64_t largest = 0;
    for (int i = 0; i < listed; ++i) {
      list.parameter[i] = parameters[first + i];
      const int64_t n = list.parameter[i].rows * list.parameter[i].columns;
      largest = n > largest ? n : largest;
    }
    if (largest == 0) continue;
    const dim3 grid(static_cast<unsigned>(grid_for(largest, kThreads, 132 * 8)), static_cast<unsigned>(listed));
    rmsprop_dense_kernel<<<grid, kThreads, 0, stream>>>(list, scalars);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

cudaError_t ftrl_dense(float* weight, float* accum, float* linear, const float* grad, int64_t n, core::FtrlRule rule,
                       const float* grad_scale, const float* found_inf, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  ftrl_dense_kernel<<<grid_for(n, kThreads), kThreads, 0, stream>>>(weight, accum, linear, grad, n, rule, grad_scale,
                                                                    found_inf);
  return cudaGetLastError();
}

cudaError_t rmsprop_rows(float* weight, float* rms, int32_t* last_step, const ListedRows& rows, const float* lr,
                         const int64_t* step, float rho, float eps, cudaStream_t stream) {
  return listed_rows(rows, RmspropRows{weight, rms, last_step, lr, step, rho, eps}, stream);
}

cudaError_t ftrl_rows(float* weight, float* accum, float* linear, const ListedRows& rows, core::FtrlRule rule,
                      cudaStream_t stream) {
  return listed_rows(rows, FtrlRows{weight, accum, linear, rule}, stream);
}

cudaError_t rmsprop_settle(float* rms, int32_t* last_step, int64_t rows, int64_t D, const int64_t* step, float rho,
                           cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  settle_kernel<<<grid_for(rows * 32, kThreads), kThreads, 0, stream>>>(rms, last_step, rows, D, step, rho);
  return cudaGetLastError();
}

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

cudaError_t auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                          int64_t bins, cudaStream_t stream) {
  if (B == 0) return cudaSuccess;
  auc_histogram_kernel<<<grid_for(B, kThreads), kThreads, 0, stream>>>(
      logit, label, B, reinterpret_cast<unsigned long long*>(positives),
      reinterpret_cast<unsigned long long*>(negatives), bins);
  return cudaGetLastError();
}

}  // namespace widedeep::kernels
