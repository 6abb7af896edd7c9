// The matrix product alone, on one thread, behind a C interface.
#include "cpu/gemm.h"
#include "cpu/parallel.h"

void widedeep::cpu::detail::run_parallel(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                                         void* context) {
  body(begin, end, context);
}

extern "C" const char* probe_instructions() { return widedeep::cpu::gemm_instructions(); }

extern "C" void probe_gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_stride, int a_transposed,
                           const float* b, int64_t b_stride, int b_transposed, float* c, int64_t c_stride) {
  widedeep::cpu::gemm(M, N, K, {a, a_stride, a_transposed != 0}, {b, b_stride, b_transposed != 0}, c, c_stride);
}

// How often each element was handed to the epilogue: added to visits[M, N].
extern "C" void probe_epilogue(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c,
                               int64_t* visits) {
  widedeep::cpu::gemm(M, N, K, {a, K, false}, {b, N, false}, c, N, [&](const widedeep::cpu::Tile& t) {
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.columns; ++j) {
        visits[(t.row + i) * N + t.column + j] += 1 + (t.c[i * t.stride + j] != c[(t.row + i) * N + t.column + j]);
      }
  });
}
