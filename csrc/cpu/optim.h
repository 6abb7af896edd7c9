// Updates of dense parameters and of listed rows of a table; the rules are core's. All in place, bitwise the same for
// any number of threads.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/ftrl.h"
#include "core/rmsprop.h"

namespace widedeep::cpu {

// n elements whose gradients are g * inverse_scale; decay multiplies rms before the step's own.
void rmsprop_span(float* __restrict__ w, float* __restrict__ rms, const float* __restrict__ g, int64_t n, float decay,
                  float inverse_scale, core::RmspropRule rule);

// One dense RMSprop parameter of n elements. grad: of storage type grad_type, multiplied by inverse_scale when read.
// copy: of storage type copy_type, written with the new weight; null where there is none.
struct DenseParameter {
  float* weight;
  float* rms;
  const void* grad;
  void* copy;
  int64_t n;
  core::DType grad_type, copy_type;
};
void rmsprop_dense(const DenseParameter& p, core::RmspropRule rule, float inverse_scale);

void ftrl_dense(float* weight, float* accum, float* linear, const float* grad, int64_t n, core::FtrlRule rule,
                float inverse_scale);

// Listed rows of a [R, D] table. rows [n] i64 in any order, -1 = skip; grads [n, D]; equal rows are summed, in the
// order listed, before the update sees them. Caller guarantees -1 <= rows < R.
void rmsprop_rows(float* weight, float* rms, int32_t* last_step, const int64_t* rows, const float* grads, int64_t n,
                  int64_t D, core::RmspropRule rule, int64_t step);
void ftrl_rows(float* weight, float* accum, float* linear, const int64_t* rows, const float* grads, int64_t n,
               int64_t D, core::FtrlRule rule);

// rms [R, D] *= rho^(step - last_step) row by row; last_step [R] = step.
void rmsprop_settle(float* rms, int32_t* last_step, int64_t R, int64_t D, int64_t step, float rho);

}  // namespace widedeep::cpu
