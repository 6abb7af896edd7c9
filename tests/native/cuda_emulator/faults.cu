// Kernels with one fault each, to see that the emulator sees it. Called by tests/test_emulated_kernels.py.
#include <cuda_pipeline_primitives.h>

#include "kernels/common.cuh"

namespace {

constexpr int kThreads = 64;

// out[i] = the number of the thread opposite, by way of shared memory.
__global__ void reverse_kernel(int32_t* out, bool with_barrier) {
  __shared__ int32_t numbers[kThreads];
  numbers[threadIdx.x] = static_cast<int32_t>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
}

__global__ void half_barrier_kernel(int32_t* out) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_warp_kernel(int32_t* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void past_the_end_kernel(int32_t* out) { out[threadIdx.x + (threadIdx.x == 63 ? 4 : 0)] = 1; }

__global__ void misaligned_kernel(int32_t* out) { *reinterpret_cast<uint4*>(out + threadIdx.x % 4) = uint4{}; }

__global__ void index_kernel(int32_t* out) {
  __shared__ int32_t numbers[kThreads];
  numbers[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x + 1];
}

__global__ void large_kernel(int32_t* out) {
  extern __shared__ int32_t dynamic[];
  __shared__ int32_t fixed[256];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 0;
  out[threadIdx.x] = fixed[threadIdx.x];
}

// out[i] += i + 7, by way of an asynchronous copy.
__global__ void copy_kernel(int32_t* out, bool with_wait) {
  __shared__ int32_t numbers[kThreads];
  __pipeline_memcpy_async(&numbers[threadIdx.x], out + threadIdx.x, sizeof(int32_t));
  __pipeline_commit();
  if (with_wait) __pipeline_wait_prior(0);
  out[threadIdx.x] = numbers[threadIdx.x] + static_cast<int32_t>(threadIdx.x) + 7;
}

// As the second of two kernels that overlap.
__global__ void early_kernel(int32_t* out) {
  if (threadIdx.x % 2) return;
  cudaGridDependencySynchronize();
  out[threadIdx.x] = 1;
}

cudaError_t launch_early(int32_t* out) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(1), dim3(kThreads), 0, nullptr, &early, 1};
  return cudaLaunchKernelEx(&config, early_kernel, out);
}

}  // namespace

// out [64]
extern "C" int run_fault(int64_t fault, int32_t* out) {
  void* const stream = nullptr;
  switch (fault) {
    case 0:
    case 1:
      reverse_kernel<<<1, kThreads, 0, stream>>>(out, fault == 0);
      break;
    case 2:
      half_barrier_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 3:
      half_warp_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 4:
      past_the_end_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 5:
      misaligned_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 6:
      index_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 7:
      large_kernel<<<1, kThreads, 48 * 1024, stream>>>(out);
      break;
    case 9:
    case 10:
      copy_kernel<<<1, kThreads, 0, stream>>>(out, fault == 9);
      break;
    case 11:
      return launch_early(out);
    default:
      reverse_kernel<<<0, kThreads, 0, stream>>>(out, true);
  }
  return cudaGetLastError();
}
