// cuBLASLt thinks in columns: a row-major matrix [r, c] is its column-major [c, r]. So features lie on the rows of D,
// where the bias epilogue wants them, and each product swaps its operands.
#pragma once
#include <cublasLt.h>

#include "kernels/gemm.h"

namespace widedeep::kernels {

inline cudaDataType_t data_type(core::DType t) {
  return t == core::DType::f32 ? CUDA_R_32F : t == core::DType::f16 ? CUDA_R_16F : CUDA_R_16BF;
}

// Descriptors of one problem in the library's terms: D [m, n] = op(first) op(second), column-major.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t first = nullptr, second = nullptr, d = nullptr;

  Plan() = default;
  Plan(const Plan&) = delete;
  ~Plan() {
    if (d) cublasLtMatrixLayoutDestroy(d);
    if (second) cublasLtMatrixLayoutDestroy(second);
    if (first) cublasLtMatrixLayoutDestroy(first);
    if (operation) cublasLtMatmulDescDestroy(operation);
  }

  cublasStatus_t make(const Gemm& g, const void* bias) {
    const auto compute = g.operands == core::DType::f32 && g.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const auto operand = data_type(g.operands);
    if (auto s = cublasLtMatmulDescCreate(&operation, compute, CUDA_R_32F)) return s;
    cublasOperation_t transpose_first = CUBLAS_OP_N, transpose_second = CUBLAS_OP_N;
    uint64_t rows_d = 0, columns_d = 0;
    switch (g.product) {
      case Product::forward:  // D [O, B] = (weight as [I, O])^T (x as [I, B])
        transpose_first = CUBLAS_OP_T;
        if (auto s = cublasLtMatrixLayoutCreate(&first, operand, g.I, g.O, g.I)) return s;
        if (auto s = cublasLtMatrixLayoutCreate(&second, operand, g.I, g.B, g.I)) return s;
        rows_d = g.O, columns_d = g.B;
        break;
      case Product::dgrad:  // D [I, B] = (weight as [I, O]) (dz as [O, B])
        if (auto s = cublasLtMatrixLayoutCreate(&first, operand, g.I, g.O, g.I)) return s;
        if (auto s = cublasLtMatrixLayoutCreate(&second, operand, g.O, g.B, g.O)) return s;
        rows_d = g.I, columns_d = g.B;
        break;
      case Product::wgrad:  // D [I, O] = (x as [I, B]) (dz as [O, B])^T
        transpose_second = CUBLAS_OP_T;
        if (auto s = cublasLtMatrixLayoutCreate(&first, operand, g.I, g.B, g.I)) return s;
        if (auto s = cublasLtMatrixLayoutCreate(&second, operand, g.O, g.B, g.O)) return s;
        rows_d = g.I, columns_d = g.O;
        break;
    }
    if (auto s = cublasLtMatrixLayoutCreate(&d, data_type(g.result), rows_d, columns_d, rows_d)) return s;
    if (auto s = set(CUBLASLT_MATMUL_DESC_TRANSA, transpose_first)) return s;
    if (auto s = set(CUBLASLT_MATMUL_DESC_TRANSB, transpose_second)) return s;
    if (g.bias_relu) {
      if (auto s = set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_RELU_BIAS)) return s;
      if (auto s = set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)) return s;
    }
    return CUBLAS_STATUS_SUCCESS;
  }

 private:
  template <typename T>
  cublasStatus_t set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    return cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value);
  }
};

}  // namespace widedeep::kernels
