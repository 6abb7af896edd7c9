#include "cpu/optim.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/element.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// Elements per block of the dense loops: small enough for the converted gradient to stay in L1, and a multiple of every
// vector width, so that an element takes the same instructions wherever threads cut.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlocksPerThread = 8;

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

void ftrl_span(float* __restrict__ w, float* __restrict__ accum, float* __restrict__ linear,
               const float* __restrict__ g, int64_t n, float inverse_scale, core::FtrlRule rule) {
  for (int64_t i = 0; i < n; ++i) core::ftrl(w[i], accum[i], linear[i], g[i] * inverse_scale, rule);
}

// Calls update(row, gradient) once for every distinct row, in parallel; gradient points at D floats.
template <typename Update>
void for_distinct_rows(const int64_t* rows, const float* grads, int64_t n, int64_t D, const Update& update) {
  std::vector<int64_t> order;
  order.reserve(n);
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] >= 0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
  std::vector<int64_t> start;
  start.reserve(order.size() + 1);
  for (size_t i = 0; i < order.size(); ++i)
    if (i == 0 || rows[order[i]] != rows[order[i - 1]]) start.push_back(static_cast<int64_t>(i));
  start.push_back(static_cast<int64_t>(order.size()));

  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(D, 1));
  parallel_for(0, static_cast<int64_t>(start.size()) - 1, grain, [&](int64_t first, int64_t last) {
    std::vector<float> sum(D);
    for (int64_t s = first; s < last; ++s) {
      const float* gradient = grads + order[start[s]] * D;
      if (start[s + 1] - start[s] > 1) {
        std::copy(gradient, gradient + D, sum.begin());
        for (int64_t i = start[s] + 1; i < start[s + 1]; ++i) {
          const float* next = grads + order[i] * D;
          for (int64_t d = 0; d < D; ++d) sum[d] += next[d];
        }
        gradient = sum.data();
      }
      update(rows[order[start[s]]], gradient);
    }
  });
}

}  // namespace

void rmsprop_span(float* __restrict__ w, float* __restrict__ rms, const float* __restrict__ g, int64_t n, float decay,
                  float inverse_scale, core::RmspropRule rule) {
  for (int64_t i = 0; i < n; ++i) core::rmsprop(w[i], rms[i], g[i] * inverse_scale, decay, rule);
}

void rmsprop_dense(const DenseParameter& p, core::RmspropRule rule, float inverse_scale) {
  visit(p.grad_type, [&](auto* grad_tag) {
    using G = std::remove_pointer_t<decltype(grad_tag)>;
    visit(p.copy_type, [&](auto* copy_tag) {
      using C = std::remove_pointer_t<decltype(copy_tag)>;
      parallel_for(0, blocks_of(p.n), kBlocksPerThread, [&](int64_t first, int64_t last) {
        const FlushDenormals flush;
        float converted[kBlock];
        for (int64_t block = first; block < last; ++block) {
          const int64_t at = block * kBlock, count = std::min(kBlock, p.n - at);
          const float* g;
          if constexpr (std::is_same_v<G, float>) {
            g = static_cast<const float*>(p.grad) + at;
          } else {
            load_row(static_cast<const G*>(p.grad) + at, converted, count);
            g = converted;
          }
          rmsprop_span(p.weight + at, p.rms + at, g, count, 1.0f, inverse_scale, rule);
          if (p.copy != nullptr) store_row(p.weight + at, static_cast<C*>(p.copy) + at, count);
        }
      });
    });
  });
}

void ftrl_dense(float* weight, float* accum, float* linear, const float* grad, int64_t n, core::FtrlRule rule,
                float inverse_scale) {
  parallel_for(0, blocks_of(n), kBlocksPerThread, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * kBlock, count = std::min(kBlock, n - at);
      ftrl_span(weight + at, accum + at, linear + at, grad + at, count, inverse_scale, rule);
    }
  });
}

void rmsprop_rows(float* weight, float* rms, int32_t* last_step, const int64_t* rows, const float* grads, int64_t n,
                  int64_t D, core::RmspropRule rule, int64_t step) {
  for_distinct_rows(rows, grads, n, D, [&](int64_t row, const float* gradient) {
    const float decay = core::rmsprop_catch_up(step, last_step[row], rule.rho);
    rmsprop_span(weight + row * D, rms + row * D, gradient, D, decay, 1.0f, rule);
    last_step[row] = static_cast<int32_t>(step);
  });
}

void ftrl_rows(float* weight, float* accum, float* linear, const int64_t* rows, const float* grads, int64_t n,
               int64_t D, core::FtrlRule rule) {
  for_distinct_rows(rows, grads, n, D, [&](int64_t row, const float* gradient) {
    ftrl_span(weight + row * D, accum + row * D, linear + row * D, gradient, D, 1.0f, rule);
  });
}

void rmsprop_settle(float* rms, int32_t* last_step, int64_t R, int64_t D, int64_t step, float rho) {
  parallel_for(0, R, std::max<int64_t>(1, 16384 / std::max<int64_t>(D, 1)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float decay = core::rmsprop_catch_up(step + 1, last_step[row], rho);
      if (decay != 1.0f)
        for (int64_t d = 0; d < D; ++d) rms[row * D + d] *= decay;
      last_step[row] = static_cast<int32_t>(step);
    }
  });
}

}  // namespace widedeep::cpu
