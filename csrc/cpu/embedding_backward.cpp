#include <algorithm>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/embedding.h"
#include "cpu/optim.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// A row's gradient is summed in chunks of this many entries, and the chunks in order: the rounding error of a row that
// takes the whole batch grows with entries / kChunk + kChunk instead of with entries.
constexpr int64_t kChunk = 64;
constexpr int64_t kLine = 64 / sizeof(float);

// Cuts [0, U) into pieces of about equal work, one entry costing its feature's width.
std::vector<int64_t> equal_pieces(const Batch& batch, const Segments& s, int64_t pieces) {
  const int64_t F = static_cast<int64_t>(batch.features.size());
  constexpr int64_t kPerEntry = 32, kPerRow = 64;  // in floats: address arithmetic; the row's own reads and writes
  const auto work = [&](int64_t f, int64_t u) {
    const int64_t dim = batch.features[f].dim;
    return int64_t{s.offsets[u + 1] - s.offsets[u]} * (dim + kPerEntry) + 2 * dim + kPerRow;
  };
  int64_t total = 0;
  for (int64_t f = 0; f < F; ++f)
    for (int64_t u = s.table_start[f]; u < s.table_start[f + 1]; ++u) total += work(f, u);
  std::vector<int64_t> start{0};
  int64_t done = 0;
  for (int64_t f = 0; f < F; ++f)
    for (int64_t u = s.table_start[f]; u < s.table_start[f + 1]; ++u) {
      done += work(f, u);
      while (done * pieces >= total * static_cast<int64_t>(start.size()) && static_cast<int64_t>(start.size()) < pieces)
        start.push_back(u + 1);
    }
  start.resize(pieces, s.table_start[F]);
  start.push_back(s.table_start[F]);
  return start;
}

template <typename T>
struct RowSum {
  const Batch& batch;
  const Segments& s;
  const Gradients& g;
  std::vector<float> total, chunk, row;

  RowSum(const Batch& batch, const Segments& s, const Gradients& g) : batch(batch), s(s), g(g) {
    int64_t widest = 1;
    for (const Feature& f : batch.features) widest = std::max(widest, f.dim);
    total.resize(widest);
    chunk.resize(widest);
    row.resize(widest);
  }

  const T* source(const Feature& f, int64_t entry) const {
    return static_cast<const T*>(g.dx) + entry / batch.K * g.W + f.column;
  }

  // 1, or one over the number of valid ids of the entry's sample.
  float share(const Feature& f, int64_t entry) const {
    if (!f.mean) return 1.0f;
    const int32_t* ids = batch.ids + entry / batch.K * batch.K + f.first_id;
    return 1.0f / static_cast<float>(std::count_if(ids, ids + f.hotness, [](int32_t id) { return id >= 0; }));
  }

  // sum = or += the gradient that the entry's sample gives its row.
  template <bool kFirst>
  void add(const Feature& f, int64_t entry, float* __restrict__ sum) {
    const T* in = source(f, entry);
    const float* values;
    if constexpr (std::is_same_v<T, float>) {
      values = in;
    } else {
      load_row(in, row.data(), f.dim);
      values = row.data();
    }
    const float weight = share(f, entry);
    for (int64_t d = 0; d < f.dim; ++d) sum[d] = weight * values[d] + (kFirst ? 0.0f : sum[d]);
  }

  // The same for entries [from, to), from < to; returns the wide part.
  float add_chunk(const Feature& f, int64_t from, int64_t to, float* sum) {
    add<true>(f, s.entries[from], sum);
    float wide = g.dlogit[s.entries[from] / batch.K];
    for (int64_t i = from + 1; i < to; ++i) {
      add<false>(f, s.entries[i], sum);
      wide += g.dlogit[s.entries[i] / batch.K];
    }
    return wide;
  }

  // Gradient of distinct row u, a row of feature f: the deep part in `total`; returns the wide part.
  float operator()(const Feature& f, int64_t u) {
    const int64_t first = s.offsets[u], last = s.offsets[u + 1];
    float wide = add_chunk(f, first, std::min(last, first + kChunk), total.data());
    for (int64_t from = first + kChunk; from < last; from += kChunk) {
      wide += add_chunk(f, from, std::min(last, from + kChunk), chunk.data());
      for (int64_t d = 0; d < f.dim; ++d) total[d] += chunk[d];
    }
    return wide;
  }
};

// Calls use(feature index, u, gradient [dim], wide gradient) for every distinct row, and ask(f, u) a few rows ahead of
// it.
template <typename T, typename Use, typename Ask>
void for_each_row(const Batch& batch, const Segments& s, const Gradients& g, const Use& use, const Ask& ask) {
  constexpr int64_t kPieces = 64, kAhead = 4;
  const auto start = equal_pieces(batch, s, kPieces);
  parallel_for(0, kPieces, 1, [&](int64_t first, int64_t last) {
    RowSum<T> sum(batch, s, g);
    int64_t f = 0;
    for (int64_t u = start[first]; u < start[last]; ++u) {
      while (u >= s.table_start[f + 1]) ++f;
      if (u + kAhead < s.table_start[f + 1]) {
        ask(f, u + kAhead);
        const auto* line = sum.source(batch.features[f], s.entries[s.offsets[u + kAhead]]);
        for (int64_t d = 0; d < batch.features[f].dim; d += kLine) __builtin_prefetch(line + d);
      }
      const float wide = sum(batch.features[f], u);
      use(f, u, sum.total.data(), wide);
    }
  });
}

}  // namespace

void embedding_row_gradients(const Batch& batch, const Segments& s, const Gradients& g,
                             const std::vector<float*>& tables, float* wide) {
  const int64_t F = static_cast<int64_t>(batch.features.size());
  visit(g.dx_type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_row<T>(
        batch, s, g,
        [&](int64_t f, int64_t u, const float* gradient, float wide_gradient) {
          const int64_t dim = batch.features[f].dim;
          std::copy_n(gradient, dim, tables[f] + (u - s.table_start[f]) * dim);
          wide[u] = wide_gradient;
        },
        [](int64_t, int64_t) {});
  });
  for (int64_t f = 0; f < F; ++f) {
    const Feature& feature = batch.features[f];
    const int64_t used = s.table_start[f + 1] - s.table_start[f];
    const int64_t capacity = std::min(feature.rows, batch.B * feature.hotness);
    std::fill(tables[f] + used * feature.dim, tables[f] + capacity * feature.dim, 0.0f);
  }
  std::fill(wide + s.table_start[F], wide + batch.B * batch.K, 0.0f);
}

void embedding_update(const Batch& batch, const Segments& s, const Gradients& g, const RowUpdate& update) {
  visit(g.dx_type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_row<T>(
        batch, s, g,
        [&](int64_t f, int64_t u, const float* gradient, float wide_gradient) {
          const Feature& feature = batch.features[f];
          const int64_t row = s.unique[u], at = (row - feature.row_base) * feature.dim;
          const float decay = core::rmsprop_catch_up(update.step, update.last_step[row], update.rmsprop.rho);
          rmsprop_span(feature.table + at, feature.rms + at, gradient, feature.dim, decay, update.inverse_scale,
                       update.rmsprop);
          core::ftrl(update.wide[row], update.accum[row], update.linear[row], wide_gradient * update.inverse_scale,
                     update.ftrl);
          update.last_step[row] = static_cast<int32_t>(update.step);
        },
        [&](int64_t f, int64_t u) {
          const Feature& feature = batch.features[f];
          const int64_t at = (s.unique[u] - feature.row_base) * feature.dim;
          for (int64_t d = 0; d < feature.dim; d += kLine) {
            __builtin_prefetch(feature.table + at + d, 1);
            __builtin_prefetch(feature.rms + at + d, 1);
          }
          for (const void* flat :
               {static_cast<void*>(update.wide + s.unique[u]), static_cast<void*>(update.accum + s.unique[u]),
                static_cast<void*>(update.linear + s.unique[u]), static_cast<void*>(update.last_step + s.unique[u])})
            __builtin_prefetch(flat, 1);
        });
  });
}

}  // namespace widedeep::cpu
