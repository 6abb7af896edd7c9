// Element-wise rules as grid-stride loops; rmsprop_dense takes its list of tensors as a kernel parameter, a block row
// each.
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

template <typename Rule>
cudaError_t listed_rows(const ListedRows& rows, const Rule& rule, cudaStream_t stream) {
  if (rows.n == 0) return cudaSuccess;
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

}  // namespace widedeep::kernels
