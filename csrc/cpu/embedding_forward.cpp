#include <algorithm>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/embedding.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

constexpr int64_t kLine = 64 / sizeof(float);
// Samples ahead whose table rows are asked for: a row comes from memory, the sum of a batch's rows passes every cache.
constexpr int64_t kAhead = 2;

void prefetch_rows(const Batch& batch, int64_t b) {
  for (const Feature& f : batch.features)
    for (int64_t k = 0; k < f.hotness; ++k) {
      const int64_t id = batch.ids[b * batch.K + f.first_id + k];
      if (id < 0) continue;
      const float* row = f.table + id * f.dim;
      for (int64_t d = 0; d < f.dim; d += kLine) __builtin_prefetch(row + d);
    }
}

// The pooled row of one feature of one sample, in `sum` [dim]; adds the wide weights of its ids to `wide`.
const float* pooled(const Feature& f, const int32_t* ids, const float* wide_table, float& wide, float* sum) {
  if (f.hotness == 1 && ids[0] >= 0) {
    wide += wide_table[f.row_base + ids[0]];
    return f.table + ids[0] * f.dim;
  }
  std::fill(sum, sum + f.dim, 0.0f);
  int64_t valid = 0;
  for (int64_t k = 0; k < f.hotness; ++k) {
    if (ids[k] < 0) continue;
    ++valid;
    wide += wide_table[f.row_base + ids[k]];
    const float* row = f.table + ids[k] * f.dim;
    for (int64_t d = 0; d < f.dim; ++d) sum[d] += row[d];
  }
  if (f.mean && valid > 1) {
    const float share = 1.0f / static_cast<float>(valid);
    for (int64_t d = 0; d < f.dim; ++d) sum[d] *= share;
  }
  return sum;
}

// Columns of x that no feature writes, as [first, last) runs.
std::vector<std::pair<int64_t, int64_t>> unused_columns(const Batch& batch, const ForwardInputs& in, int64_t W) {
  std::vector<char> used(W, 0);
  for (const Feature& f : batch.features) std::fill_n(used.begin() + f.column, f.dim, 1);
  for (int64_t column : in.numeric_columns) used[column] = 1;
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (int64_t c = 0; c < W; ++c) {
    if (used[c]) continue;
    if (runs.empty() || runs.back().second != c) runs.emplace_back(c, c);
    runs.back().second = c + 1;
  }
  return runs;
}

template <typename T>
void forward(const Batch& batch, const ForwardInputs& in, T* x, int64_t W, float* wide_logit) {
  const auto unused = unused_columns(batch, in, W);
  const int64_t N = static_cast<int64_t>(in.numeric_columns.size());
  int64_t widest = 1;
  for (const Feature& f : batch.features) widest = std::max(widest, f.dim);

  parallel_for(0, batch.B, 64, [&](int64_t first, int64_t last) {
    std::vector<float> sum(widest);
    for (int64_t b = first; b < last; ++b) {
      if (b + kAhead < last) prefetch_rows(batch, b + kAhead);
      T* out = x + b * W;
      float wide = 0.0f;
      for (const Feature& f : batch.features) {
        const float* row = pooled(f, batch.ids + b * batch.K + f.first_id, in.wide, wide, sum.data());
        store_row(row, out + f.column, f.dim);
      }
      for (int64_t n = 0; n < N; ++n) {
        const float value = in.numeric[b * N + n];
        store(value, out[in.numeric_columns[n]]);
        wide += value * in.wide_numeric[n];
      }
      for (const auto& [from, to] : unused)
        for (int64_t c = from; c < to; ++c) store(0.0f, out[c]);
      wide_logit[b] = wide + in.wide_bias;
    }
  });
}

}  // namespace

int64_t find_bad_id(const Batch& batch) {
  for (int64_t b = 0; b < batch.B; ++b)
    for (const Feature& f : batch.features)
      for (int64_t k = f.first_id; k < f.first_id + f.hotness; ++k) {
        const int64_t id = batch.ids[b * batch.K + k];
        if (id < -1 || id >= f.rows) return b * batch.K + k;
      }
  return -1;
}

void embedding_forward(const Batch& batch, const ForwardInputs& in, void* x, core::DType x_type, int64_t W,
                       float* wide_logit) {
  visit(x_type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(batch, in, static_cast<T*>(x), W, wide_logit);
  });
}

}  // namespace widedeep::cpu
