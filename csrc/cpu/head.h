// The output layer, its loss and the gradients, in one pass over the last hidden activation; the gradient of the
// wide numerics.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace widedeep::cpu {

struct HeadInputs {
  const void* h;  // [B, H] of storage type `type`
  core::DType type;
  int64_t B, H;
  const float* weight;  // [H]
  float bias;
  const float* wide_logit;  // [B]
};

// logit [B] = h . weight + bias + wide_logit
void head_forward(const HeadInputs& in, float* logit);

// scale: of every gradient (the loss scale); kept_scale: of h's dropout. Results as in widedeep/ops/head.py. Row sums
// are taken over fixed groups of rows that are added in order, so the bits do not depend on the number of threads.
struct HeadStep {
  const float* label;  // [B]
  int64_t global_rows;
  float scale, kept_scale;
  float *logit, *dlogit;          // [B]
  void* dz;                       // [B, H] of h's storage type
  float *dbias_hidden, *dweight;  // [H]
  float *dbias, *loss;            // one each
};
void head_step(const HeadInputs& in, const HeadStep& out);

// dweight [N] = dlogit [B] . numeric [B, N], dbias [1] = the sum of dlogit; sums over the same groups of rows.
void wide_numeric_backward(const float* numeric, const float* dlogit, int64_t B, int64_t N, float* dweight,
                           float* dbias);

}  // namespace widedeep::cpu
