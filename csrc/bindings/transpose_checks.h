// Checks that the bindings of every device share. Contracts: widedeep/ops/linear.py.
#pragma once
#include "bindings/checks.h"

namespace widedeep {

// Bytes of an element, the same in all matrices; there is one, for torch finds no kernel for empty lists.
inline int check_transpose(const std::vector<Tensor>& matrices, const std::vector<Tensor>& out) {
  const char* op = "transpose_out";
  STD_TORCH_CHECK(matrices.size() == out.size(), op, ": matrices and out must be lists of one length, got ",
                  matrices.size(), ", ", out.size());
  const core::DType dtype = element_type(matrices[0].scalar_type(), op, "matrices");
  for (size_t i = 0; i < matrices.size(); ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const Tensor& m = matrices[i];
    check(m, op, "matrices" + at, matrices[0].scalar_type(), {kAny, kAny}, matrices[0]);
    check(out[i], op, "out" + at, m.scalar_type(), {m.size(1), m.size(0)}, m);
  }
  return core::bytes_of(dtype);
}

}  // namespace widedeep
