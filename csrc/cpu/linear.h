// One hidden layer, y = dropout(relu(x weight^T + bias)), and its gradients. All matrices are row-major and dense, of
// one type; arithmetic is in float, each result rounded once. The same bits for any number of threads.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/philox.h"

namespace widedeep::cpu {

struct LinearSize {
  int64_t B, I, O;  // batch rows, inputs, outputs
};

// What the gradient of a layer's input looks through: the input itself [B, I], whose elements > 0 count, or what
// linear_forward wrote into `bits` with it; at most one of the two.
struct Mask {
  const void* values;   // of the matrices' type, or null
  const uint8_t* bits;  // as core/bits.h says, or null
};

// y[B, O] from x[B, I], weight[O, I], bias[O]. Row b has the dropout of row first_row + b. bits (may be null): whether
// y > 0, as core/bits.h says.
void linear_forward(core::DType type, const LinearSize& size, const void* x, const void* weight, const float* bias,
                    const core::Dropout& dropout, int64_t first_row, void* y, uint8_t* bits);

// dx[B, I] = dz[B, O] weight[O, I]; with a mask, multiplied by `scale` where it is set and zero elsewhere.
// dbias[I] (may be null) = column sums of that, before it is rounded.
void linear_dgrad(core::DType type, const LinearSize& size, const void* dz, const void* weight, const Mask& mask,
                  float scale, void* dx, float* dbias);

// dweight[O, I] = dz[B, O]^T x[B, I], in float.
void linear_wgrad(core::DType type, const LinearSize& size, const void* dz, const void* x, float* dweight);

// The elementwise parts alone, for products that a library has made.
// z[B, O] becomes dropout(relu(z + bias)) in place.
void bias_relu_dropout(core::DType type, void* z, const float* bias, int64_t B, int64_t O, const core::Dropout& dropout,
                       int64_t first_row, uint8_t* bits);
// dz[B, O] = dy[B, O] * scale where the mask is set, else 0; dz may be dy, and without a mask must be. dbias[O] (may be
// null) = column sums of dz before it is rounded.
void mask_and_sum(core::DType type, const void* dy, const Mask& mask, float scale, void* dz, float* dbias, int64_t B,
                  int64_t O);

}  // namespace widedeep::cpu
