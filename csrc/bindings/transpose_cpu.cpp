// Transposed copies on a CPU. Contract: widedeep/ops/linear.py.
#include <torch/csrc/stable/library.h>

#include "bindings/transpose_checks.h"
#include "cpu/transpose_copy.h"

namespace widedeep {
namespace {

template <typename T>
void transpose(const Tensor& from, const Tensor& to) {
  cpu::transpose(static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(to.mutable_data_ptr()), from.size(0),
                 from.size(1));
}

void transpose_out(std::vector<Tensor> matrices, std::vector<Tensor> out) {
  const int bytes = check_transpose(matrices, out);
  for (size_t i = 0; i < matrices.size(); ++i)
    bytes == 2 ? transpose<uint16_t>(matrices[i], out[i]) : transpose<uint32_t>(matrices[i], out[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) { m.impl("transpose_out", TORCH_BOX(&transpose_out)); }

}  // namespace widedeep
