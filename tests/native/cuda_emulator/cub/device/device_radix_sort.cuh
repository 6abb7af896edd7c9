#pragma once
#include <numeric>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

struct DeviceRadixSort {
  // Stable, by the bits [begin_bit, end_bit) of the keys. Without workspace: says how much it wants.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* workspace, size_t& bytes, const Key* keys, Key* sorted, const Value* values,
                               Value* ordered, int64_t n, int begin_bit, int end_bit, cudaStream_t = nullptr) {
    const size_t wanted = 2 * n * (sizeof(Key) + sizeof(Value)) + 1;
    if (!workspace) {
      bytes = wanted;
      return cudaSuccess;
    }
    if (bytes < wanted) return cudaErrorInvalidValue;
    std::memset(workspace, 0xFF, bytes);  // what lies here must belong to nobody
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    const Key mask = (end_bit - begin_bit >= int{sizeof(Key) * 8} ? ~Key{0} : (Key{1} << (end_bit - begin_bit)) - 1)
                     << begin_bit;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (int64_t i = 0; i < n; ++i) {
      sorted[i] = keys[order[i]];
      ordered[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
