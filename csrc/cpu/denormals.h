// Numbers below the smallest normal float count as zero while one of these lives, on the thread that made it. The mean
// square of a weight without gradients halves until it is one of them and stays there, and arithmetic with them takes
// forty times as long. Beside epsilon they decide nothing.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace widedeep::cpu {

#if defined(__SSE2__)
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x0040 /* operands too */); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};
#elif defined(__aarch64__)
// "memory": loads, and so the arithmetic on what they bring, and stores stay on their side of the change.
class FlushDenormals {
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | uint64_t{1} << 24);  // FZ: results and operands, of float and double; not where halves are widened
  }
  ~FlushDenormals() { set(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static void set(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }

  uint64_t before_;
};
#else
struct FlushDenormals {
  FlushDenormals() {}
};
#endif

}  // namespace widedeep::cpu
