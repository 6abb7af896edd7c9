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

// out[i] = what shared memory held before anyone wrote there.
__global__ void leftover_kernel(int32_t* out) {
  __shared__ int32_t numbers[kThreads];
  out[threadIdx.x] = numbers[threadIdx.x];
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

__global__ void before_the_start_kernel(int32_t* out) { out[threadIdx.x] = *(out + threadIdx.x - 1); }

// numbers [62]: of the last load's four words two are there.
__global__ void ragged_end_kernel(const int32_t* numbers, int32_t* out) {
  if (threadIdx.x % 4 == 0)
    *reinterpret_cast<uint4*>(out + threadIdx.x) = reinterpret_cast<const uint4*>(numbers + threadIdx.x)[0];
}

__global__ void stray_pointer_kernel() { *reinterpret_cast<int32_t*>(64 * threadIdx.x + 64) = 1; }

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

__global__ void dynamic_kernel(int32_t* out) {
  extern __shared__ int32_t dynamic[];
  dynamic[threadIdx.x] = out[threadIdx.x] = 0;
}

// out[i] += i + 7, by way of an asynchronous copy.
__global__ void copy_kernel(int32_t* out, bool with_wait) {
  __shared__ int32_t numbers[kThreads];
  __pipeline_memcpy_async(&numbers[threadIdx.x], out + threadIdx.x, sizeof(int32_t));
  __pipeline_commit();
  if (with_wait) __pipeline_wait_prior(0);
  out[threadIdx.x] = numbers[threadIdx.x] + static_cast<int32_t>(threadIdx.x) + 7;
}

__global__ void copy_past_the_end_kernel(const int32_t* numbers) {
  __shared__ uint4 copies[kThreads / 4];
  if (threadIdx.x % 4 != 0) return;
  __pipeline_memcpy_async(&copies[threadIdx.x / 4], numbers + threadIdx.x, sizeof(uint4));
  __pipeline_commit();
  __pipeline_wait_prior(0);
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

template <typename Kernel>
cudaError_t with_few_numbers(Kernel kernel) {
  void* const numbers = emulator_allocate(62 * sizeof(int32_t));
  emulator::Call("few_numbers", 1, kThreads)([=] { kernel(static_cast<const int32_t*>(numbers)); });
  emulator_release(numbers);
  return cudaGetLastError();
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
    case 12:
      before_the_start_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    case 13:
      return with_few_numbers([=](const int32_t* numbers) { ragged_end_kernel(numbers, out); });
    case 14:
      return with_few_numbers([=](const int32_t* numbers) { copy_past_the_end_kernel(numbers); });
    case 15:
      dynamic_kernel<<<1, kThreads, 61 * sizeof(int32_t), stream>>>(out);
      break;
    case 16:
      stray_pointer_kernel<<<1, kThreads, 0, stream>>>();
      break;
    case 17:
      leftover_kernel<<<1, kThreads, 0, stream>>>(out);
      break;
    default:
      reverse_kernel<<<0, kThreads, 0, stream>>>(out, true);
  }
  return cudaGetLastError();
}
