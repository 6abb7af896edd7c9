// Transposed copies on a GPU. Contract: widedeep/ops/linear.py.
#include <torch/csrc/stable/library.h>

#include "bindings/stream.h"
#include "bindings/transpose_checks.h"
#include "kernels/transpose.h"

namespace widedeep {
namespace {

void transpose_out(std::vector<Tensor> matrices, std::vector<Tensor> out) {
  const int bytes = check_transpose(matrices, out);
  std::vector<kernels::Transposed> list;
  for (size_t i = 0; i < matrices.size(); ++i) {
    check_aligned(matrices[i], "transpose_out", "matrices");
    check_aligned(out[i], "transpose_out", "out");
    list.push_back({matrices[i].const_data_ptr(), out[i].mutable_data_ptr(), matrices[i].size(0), matrices[i].size(1)});
  }
  const DeviceGuard guard(matrices[0].get_device_index());
  STD_CUDA_CHECK(kernels::transpose(list.data(), static_cast<int>(list.size()), bytes, current_stream(matrices[0])));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) { m.impl("transpose_out", TORCH_BOX(&transpose_out)); }

}  // namespace widedeep
