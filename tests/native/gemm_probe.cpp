// The matrix product alone, on one thread, behind a C interface.
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

using widedeep::core::DType;

void widedeep::cpu::detail::run_parallel(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                                         void* context) {
  body(begin, end, context);
}

extern "C" const char* probe_instructions() { return widedeep::cpu::gemm_instructions(); }

// a and b are of one type, a DType's number; c is float.
extern "C" void probe_gemm(int64_t M, int64_t N, int64_t K, int type, const void* a, int64_t a_stride, int a_transposed,
                           const void* b, int64_t b_stride, int b_transposed, float* c, int64_t c_stride) {
  const auto t = static_cast<DType>(type);
  widedeep::cpu::gemm(M, N, K, {a, t, a_stride, a_transposed != 0}, {b, t, b_stride, b_transposed != 0}, c, c_stride);
}

// C, held in scratch, leaves through the epilogue as bfloat16: c[M, N].
extern "C" void probe_scratch(int64_t M, int64_t N, int64_t K, const void* a, const void* b, uint16_t* c) {
  widedeep::cpu::gemm(M, N, K, {a, DType::bf16, K, false}, {b, DType::bf16, N, false}, nullptr, 0,
                      [&](const widedeep::cpu::Tile& t) {
                        for (int64_t i = 0; i < t.rows; ++i)
                          for (int64_t j = 0; j < t.columns; ++j) {
                            widedeep::cpu::BFloat16 rounded;
                            widedeep::cpu::store(t.c[i * t.stride + j], rounded);
                            c[(t.row + i) * N + t.column + j] = rounded.bits;
                          }
                      });
}

// How often each element was handed to the epilogue: added to visits[M, N].
extern "C" void probe_epilogue(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c,
                               int64_t* visits) {
  widedeep::cpu::gemm(
      M, N, K, {a, DType::f32, K, false}, {b, DType::f32, N, false}, c, N, [&](const widedeep::cpu::Tile& t) {
        for (int64_t i = 0; i < t.rows; ++i)
          for (int64_t j = 0; j < t.columns; ++j) {
            visits[(t.row + i) * N + t.column + j] += 1 + (t.c[i * t.stride + j] != c[(t.row + i) * N + t.column + j]);
          }
      });
}
