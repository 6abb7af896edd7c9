#include "cpu/loss_scale.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// Elements between two looks at whether another thread has found one that is not finite.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlocksPerThread = 8;

}  // namespace

bool all_finite(const void* values, core::DType type, int64_t n) {
  std::atomic<bool> finite{true};
  visit(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    parallel_for(0, (n + kBlock - 1) / kBlock, kBlocksPerThread, [&](int64_t first, int64_t last) {
      const T* v = static_cast<const T*>(values);
      for (int64_t block = first; block < last && finite.load(std::memory_order_relaxed); ++block) {
        // An exponent of all ones is infinity or NaN.
        uint32_t bad = 0;
        const int64_t stop = std::min(n, (block + 1) * kBlock);
        for (int64_t i = block * kBlock; i < stop; ++i) {
          if constexpr (std::is_same_v<T, float>) {
            uint32_t bits;
            std::memcpy(&bits, v + i, sizeof bits);
            bad |= (bits & 0x7F800000u) == 0x7F800000u;
          } else {
            constexpr uint32_t exponent = std::is_same_v<T, Half> ? 0x7C00u : 0x7F80u;
            bad |= (v[i].bits & exponent) == exponent;
          }
        }
        if (bad) finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  return finite.load();
}

}  // namespace widedeep::cpu
