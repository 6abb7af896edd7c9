// What the kernels use of the CUDA runtime and of the device's built-in functions.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
inline const dim3 &blockDim = emulator::launch.block, &gridDim = emulator::launch.grid;

using std::isfinite;
using std::min;

struct int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int ptxVersion, maxThreadsPerBlock;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

extern int emulator_multiprocessors;  // of the device: a persistent grid has as many blocks at most
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
// What a function of the runtime answers: an error where it is to be refused (emulator_refuse).
cudaError_t emulator_answer();
cudaError_t emulator_function_attribute(int bytes);
cudaError_t emulator_ask_together();
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {90, 1024};
  return emulator_answer();
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return emulator_function_attribute(bytes);
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (const cudaError_t error = emulator_answer()) return error;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : emulator_multiprocessors;
  return cudaSuccess;
}
// Who asks relies on it: the next launch runs all of its clusters at a time.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  *clusters = emulator_multiprocessors / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return emulator_ask_together();
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (const cudaError_t error = emulator_answer()) return error;
  emulator::Launch launch{"cudaLaunchKernelEx", config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) launch.cluster = a.val.clusterDim.x;
    if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.early = a.val.programmaticStreamSerializationAllowed != 0;
  }
  emulator::run(launch, [=] { kernel(arguments...); });
  return cudaPeekAtLastError();
}

inline void __syncthreads() { emulator::meet(emulator::current->block->all, "__syncthreads"); }
inline int __syncthreads_or(int value) {
  emulator::Block& block = *emulator::current->block;
  emulator::meet(block.all, "__syncthreads_or");  // all have read what the one before gave
  block.any = false;
  emulator::meet(block.all, "__syncthreads_or");
  if (value) block.any = true;
  emulator::meet(block.all, "__syncthreads_or");
  return block.any;
}
// The kernel before has always ended here; what may be missed is that a thread must have waited for that.
inline void cudaGridDependencySynchronize() { emulator::current->waited = true; }
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __syncwarp() { emulator::meet_warp("__syncwarp"); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::exchange(mask, value, "__shfl_sync", [=](int) { return source; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::exchange(mask, value, "__shfl_xor_sync", [=](int lane) { return lane ^ bits; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, "__shfl_up_sync", [=](int lane) { return lane < by ? lane : lane - by; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, "__shfl_down_sync",
                            [=](int lane) { return lane + by > 31 ? lane : lane + by; });
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  emulator::exchange(mask, value, "__ballot_sync", [](int lane) { return lane; });
  unsigned bits = 0;  // what was given stays until the next exchange, which needs this thread
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(emulator::warp().given[i] & 1) << i;
  emulator::meet_warp("__ballot_sync");
  return bits;
}
inline int __popc(unsigned v) { return std::popcount(v); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
