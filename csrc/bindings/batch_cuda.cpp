// Batches of a data set in device memory, on a GPU. Contract: widedeep/ops/batch.py.
#include <torch/csrc/stable/library.h>

#include "bindings/batch_checks.h"
#include "bindings/stream.h"
#include "kernels/batch.h"

namespace widedeep {
namespace {

void gather_batch_out(Tensor ids, Tensor numeric, Tensor label, OptionalTensor group, std::vector<int64_t> order,
                      int64_t start, Tensor out_ids, Tensor out_numeric, Tensor out_label, OptionalTensor out_group) {
  check_gather_batch({ids, numeric, label}, group, start, {out_ids, out_numeric, out_label}, out_group);
  const auto epoch = epoch_order(order, ids.size(0));
  const auto from = stored_rows(ids, numeric, label, group);
  const auto to = batch_rows(out_ids, out_numeric, out_label, out_group);
  const DeviceGuard guard(ids.get_device_index());
  STD_CUDA_CHECK(
      kernels::gather_batch(from, epoch ? &*epoch : nullptr, start, out_ids.size(0), to, current_stream(ids)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) { m.impl("gather_batch_out", TORCH_BOX(&gather_batch_out)); }

}  // namespace widedeep
