// Marks the arithmetic that the CPU loops and the CUDA kernels share: plain inline functions for g++, host and device
// ones for nvcc.
#pragma once

#ifdef __CUDACC__
#define WD_HOST_DEVICE __host__ __device__
#else
#define WD_HOST_DEVICE
#endif
