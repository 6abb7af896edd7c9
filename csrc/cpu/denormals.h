// Numbers below the smallest normal float count as zero while one of these lives, on the thread that made it. The mean
// square of a weight without gradients halves until it is one of them and stays there, and arithmetic with them takes
// forty times as long. Beside epsilon they decide nothing.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
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
#else
struct FlushDenormals {
  FlushDenormals() {}
};
#endif

}  // namespace widedeep::cpu
