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

// y[B, O] from x[B, I], weight[O, I], bias[O]. Row b has the dropout of row first_row + b.
void linear_forward(core::DType type, const LinearSize& size, const void* x, const void* weight, const float* bias,
                    const core::Dropout& dropout, int64_t first_row, void* y);

// dx[B, I] = dz[B, O] weight[O, I]; with a mask [B, I], multiplied by `scale` where mask > 0 and zero elsewhere.
// dbias[I] (may be null) = column sums of that, before it is rounded.
void linear_dgrad(core::DType type, const LinearSize& size, const void* dz, const void* weight, const void* mask,
                  float scale, void* dx, float* dbias);

// dweight[O, I] = dz[B, O]^T x[B, I], in float.
void linear_wgrad(core::DType type, const LinearSize& size, const void* dz, const void* x, float* dweight);

// The elementwise parts alone, for products that a library has made.
// z[B, O] becomes dropout(relu(z + bias)) in place.
void bias_relu_dropout(core::DType type, void* z, const float* bias, int64_t B, int64_t O, const core::Dropout& dropout,
                       int64_t first_row);
// dz[B, O] = dy[B, O] * scale where mask > 0, else 0 (mask may be null: dz = dy); dz may be dy. dbias[O] (may be null)
// = column sums of dz before it is rounded.
void mask_and_sum(core::DType type, const void* dy, const void* mask, float scale, void* dz, float* dbias, int64_t B,
                  int64_t O);

}  // namespace widedeep::cpu
