// The three matrix products of a dense layer through cuBLASLt, on row-major operands with contiguous rows:
//   forward  d [B, O] = x [B, I] weight [O, I]^T     a = x,  b = weight
//   dgrad    d [B, I] = dz [B, O] weight [O, I]      a = dz, b = weight
//   wgrad    d [O, I] = dz [B, O]^T x [B, I]         a = dz, b = x; d may be float32 for half operands
// Sums in float32. The first call for a (device, product, shape, types) times every algorithm the library proposes and
// keeps the fastest (its first proposal is 5-10 % slower on Hopper); during stream capture it cannot time, and takes
// that proposal.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace widedeep::kernels {

enum class Product { forward, dgrad, wgrad };

struct Gemm {
  Product product;
  int64_t B, I, O;
  core::DType operands, result;
  bool tf32;       // float32 operands may be rounded to TF32
  bool bias_relu;  // forward only: d = relu(d + bias), bias [O] in the operands' type
};

constexpr size_t kGemmWorkspace = size_t{32} << 20;  // split-K of wgrad keeps 16 MB of partial sums

// workspace: kGemmWorkspace bytes, 256-byte aligned, not shared with work on another stream. bias null unless
// bias_relu. A size of zero is a no-op, but for wgrad with B = 0, which writes zeros. cudaErrorNotSupported: the
// library has no algorithm for the shape (half operands want sizes that are multiples of 8).
cudaError_t gemm(const Gemm& problem, const void* a, const void* b, const void* bias, void* d, void* workspace,
                 cudaStream_t stream);

}  // namespace widedeep::kernels
