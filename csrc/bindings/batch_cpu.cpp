// Batches of a data set in memory, on the CPU. Contract: widedeep/ops/batch.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/batch_checks.h"
#include "cpu/batch.h"

namespace widedeep {
namespace {

void gather_batch_out(Tensor ids, Tensor numeric, Tensor label, OptionalTensor group, std::vector<int64_t> order,
                      int64_t start, Tensor out_ids, Tensor out_numeric, Tensor out_label, OptionalTensor out_group) {
  check_gather_batch({ids, numeric, label}, group, start, {out_ids, out_numeric, out_label}, out_group);
  const auto epoch = epoch_order(order, ids.size(0));
  const cpu::StoredRows from{static_cast<const int32_t*>(ids.const_data_ptr()),
                             static_cast<const float*>(numeric.const_data_ptr()),
                             static_cast<const float*>(label.const_data_ptr()),
                             group ? static_cast<const int64_t*>(group->const_data_ptr()) : nullptr,
                             ids.size(1),
                             numeric.size(1)};
  const cpu::BatchRows to{static_cast<int32_t*>(out_ids.mutable_data_ptr()),
                          static_cast<float*>(out_numeric.mutable_data_ptr()),
                          static_cast<float*>(out_label.mutable_data_ptr()),
                          out_group ? static_cast<int64_t*>(out_group->mutable_data_ptr()) : nullptr};
  cpu::gather_batch(from, epoch ? &*epoch : nullptr, start, out_ids.size(0), to);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CPU, m) { m.impl("gather_batch_out", TORCH_BOX(&gather_batch_out)); }

}  // namespace widedeep
