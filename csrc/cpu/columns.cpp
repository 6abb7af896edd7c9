#include "cpu/columns.h"

#include <algorithm>
#include <limits>

#include "cpu/element.h"

namespace widedeep::cpu {
namespace {

constexpr int64_t kTile = 256;  // rows whose places in the matrices stay in the cache while all columns write to them

// Rows of one part: where they lie in it, and where they go.
struct Run {
  int64_t local[kTile], slots[kTile];
  int64_t count = 0;
};

template <typename T>
int32_t id_of(T stored) {
  return stored == std::numeric_limits<T>::max() ? -1 : static_cast<int32_t>(stored);
}

// One column of `width` values a row, into a matrix with `stride` columns.
template <typename T, typename To, typename F>
void copy(const void* part, int64_t width, const Run& run, To* to, int64_t stride, const F& convert) {
  const T* const from = static_cast<const T*>(part);
  for (int64_t i = 0; i < run.count; ++i)
    for (int64_t w = 0; w < width; ++w) to[run.slots[i] * stride + w] = convert(from[run.local[i] * width + w]);
}

void copy_ids(const StoredColumn& column, size_t part, const Run& run, int32_t* to, int64_t stride) {
  const auto call = [&]<typename T>() {
    if (column.width == 1) return copy<T>(column.parts[part], 1, run, to, stride, id_of<T>);
    copy<T>(column.parts[part], column.width, run, to, stride, id_of<T>);
  };
  if (column.type == Stored::u8) return call.operator()<uint8_t>();
  if (column.type == Stored::u16) return call.operator()<uint16_t>();
  call.operator()<uint32_t>();
}

void copy_floats(const StoredColumn& column, size_t part, const Run& run, float* to, int64_t stride) {
  const void* const from = column.parts[part];
  if (column.type == Stored::f32) return copy<float>(from, 1, run, to, stride, [](float v) { return v; });
  if (column.type == Stored::f16) return copy<Half>(from, 1, run, to, stride, [](Half v) { return to_float(v); });
  copy<uint8_t>(from, 1, run, to, stride, [](uint8_t v) { return static_cast<float>(v); });
}

}  // namespace

void assemble_rows(const StoredColumns& from, const int64_t* rows, const int64_t* slots, int64_t count,
                   const core::BatchRows& to) {
  int64_t K = 0;
  for (const StoredColumn& column : from.ids) K += column.width;
  const auto N = static_cast<int64_t>(from.numeric.size());
  Run run;
  size_t part = 0;
  for (int64_t first = 0; first < count; first += run.count) {
    // The next rows of one part, as many as a tile has.
    const auto within = [&](int64_t row) { return row < from.ends[part] && (part == 0 || row >= from.ends[part - 1]); };
    if (!within(rows[first]))
      part = std::upper_bound(from.ends.begin(), from.ends.end(), rows[first]) - from.ends.begin();
    const int64_t start = part == 0 ? 0 : from.ends[part - 1];
    int64_t n = 0;
    for (; n < kTile && first + n < count && within(rows[first + n]); ++n) {
      run.local[n] = rows[first + n] - start;
      run.slots[n] = slots ? slots[first + n] : first + n;
    }
    run.count = n;
    int64_t at = 0;
    for (const StoredColumn& column : from.ids) {
      copy_ids(column, part, run, to.ids + at, K);
      at += column.width;
    }
    for (int64_t c = 0; c < N; ++c) copy_floats(from.numeric[c], part, run, to.numeric + c, N);
    copy_floats(from.label, part, run, to.label, 1);
    if (!from.group.parts.empty())
      copy<int64_t>(from.group.parts[part], 1, run, to.group, 1, [](int64_t v) { return v; });
  }
}

}  // namespace widedeep::cpu
