#include <algorithm>
#include <utility>

#include "cpu/embedding.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// Flat rows of a table follow those of the table before, so each feature is sorted by itself: its keys fit in cache and
// in few bits, and features go in parallel.
constexpr int kDigitBits = 10;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

struct Key {
  int32_t id, position;
};

struct Sorted {
  std::vector<Key> keys;
  int64_t distinct = 0;
};

// LSD radix sort by id; stable, and positions come in ascending, so equal ids stay ordered by position.
void radix_sort(std::vector<Key>& keys, int64_t rows) {
  std::vector<Key> other(keys.size());
  for (int shift = 0; (rows - 1) >> shift > 0; shift += kDigitBits) {
    int64_t start[kDigits] = {};
    for (const Key& key : keys) ++start[(key.id >> shift) & (kDigits - 1)];
    int64_t sum = 0;
    for (int64_t& s : start) sum += std::exchange(s, sum);
    for (const Key& key : keys) other[start[(key.id >> shift) & (kDigits - 1)]++] = key;
    keys.swap(other);
  }
}

Sorted sort_feature(const Batch& batch, const Feature& f) {
  Sorted out;
  out.keys.reserve(batch.B * f.hotness);
  for (int64_t b = 0; b < batch.B; ++b)
    for (int64_t k = 0; k < f.hotness; ++k) {
      const int64_t position = b * batch.K + f.first_id + k;
      if (batch.ids[position] >= 0) out.keys.push_back({batch.ids[position], static_cast<int32_t>(position)});
    }
  radix_sort(out.keys, f.rows);
  for (size_t i = 0; i < out.keys.size(); ++i) out.distinct += i == 0 || out.keys[i].id != out.keys[i - 1].id;
  return out;
}

}  // namespace

void embedding_segments(const Batch& batch, const Segments& out) {
  const int64_t F = static_cast<int64_t>(batch.features.size()), n = batch.B * batch.K;
  std::vector<Sorted> sorted(F);
  parallel_for(0, F, 1, [&](int64_t first, int64_t last) {
    for (int64_t f = first; f < last; ++f) sorted[f] = sort_feature(batch, batch.features[f]);
  });

  std::vector<int64_t> first_entry(F + 1, 0);
  out.table_start[0] = 0;
  for (int64_t f = 0; f < F; ++f) {
    first_entry[f + 1] = first_entry[f] + static_cast<int64_t>(sorted[f].keys.size());
    out.table_start[f + 1] = static_cast<int32_t>(out.table_start[f] + sorted[f].distinct);
  }
  for (int64_t f = 0; f < F; ++f) {
    int64_t at = first_entry[f], slot = out.table_start[f];
    int32_t previous = -1;
    for (const Key& key : sorted[f].keys) {
      const auto row = static_cast<int32_t>(batch.features[f].row_base + key.id);
      if (key.id != previous) {
        out.unique[slot] = row;
        out.offsets[slot++] = static_cast<int32_t>(at);
        previous = key.id;
      }
      out.keys[at] = row;
      out.entries[at++] = key.position;
    }
  }
  std::fill(out.unique + out.table_start[F], out.unique + n, -1);
  std::fill(out.offsets + out.table_start[F], out.offsets + n + 1, static_cast<int32_t>(first_entry[F]));
  std::fill(out.entries + first_entry[F], out.entries + n, -1);
  const int64_t R = F > 0 ? batch.features[F - 1].row_base + batch.features[F - 1].rows : 0;
  std::fill(out.keys + first_entry[F], out.keys + n, static_cast<int32_t>(R));
}

bool segments_fit(const Batch& batch, const Segments& s) {
  const int64_t F = static_cast<int64_t>(batch.features.size()), n = batch.B * batch.K;
  bool fits = s.table_start[0] == 0 && s.offsets[0] == 0;
  for (int64_t f = 0; f < F; ++f) fits = fits && s.table_start[f] <= s.table_start[f + 1];
  fits = fits && s.table_start[F] <= n;
  for (int64_t f = 0; fits && f < F; ++f) {
    const Feature& feature = batch.features[f];
    fits = s.table_start[f + 1] - s.table_start[f] <= std::min(feature.rows, batch.B * feature.hotness);
    for (int64_t u = s.table_start[f]; fits && u < s.table_start[f + 1]; ++u)
      fits = s.unique[u] >= feature.row_base && s.unique[u] < feature.row_base + feature.rows &&
             (u == 0 || s.unique[u] > s.unique[u - 1]) && s.offsets[u] < s.offsets[u + 1];
  }
  const int64_t used = fits ? s.offsets[s.table_start[F]] : 0;
  fits = fits && used <= n;
  for (int64_t i = 0, u = 0; fits && i < used; ++i) {
    u += i == s.offsets[u + 1];
    fits = s.entries[i] >= 0 && s.entries[i] < n && s.keys[i] == s.unique[u];
  }
  return fits;
}

}  // namespace widedeep::cpu
