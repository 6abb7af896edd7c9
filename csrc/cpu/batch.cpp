#include "cpu/batch.h"

#include <algorithm>
#include <optional>

#include "cpu/order.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

constexpr int64_t kAhead = 64;  // rows whose places are known, and on their way into the cache, before they are copied

}  // namespace

void gather_batch(const StoredRows& from, const core::EpochOrder* order, int64_t start, int64_t B,
                  const BatchRows& to) {
  const int64_t K = from.K, N = from.N;
  parallel_for(0, B, 2048, [&](int64_t begin, int64_t end) {
    int64_t place[kAhead];
    std::optional<OrderedRows> ordered;
    if (order) ordered.emplace(*order, start + begin);
    for (int64_t first = begin; first < end; first += kAhead) {
      const int64_t rows = std::min(kAhead, end - first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = ordered ? (*ordered)(start + first + i) : start + first + i;
        place[i] = row;
        __builtin_prefetch(from.ids + row * K);
        __builtin_prefetch(from.numeric + row * N);
        __builtin_prefetch(from.label + row);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = place[i], b = first + i;
        std::copy_n(from.ids + row * K, K, to.ids + b * K);
        std::copy_n(from.numeric + row * N, N, to.numeric + b * N);
        to.label[b] = from.label[row];
        if (from.group) to.group[b] = from.group[row];
      }
    }
  });
}

}  // namespace widedeep::cpu
