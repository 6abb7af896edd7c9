// Loss-scale ops on a GPU. Contracts: widedeep/ops/loss_scale.py.
#include <torch/csrc/stable/library.h>

#include "bindings/loss_scale_checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "kernels/loss_scale.h"

namespace widedeep {
namespace {

void check_finite_(std::vector<Tensor> tensors, Tensor found_inf) {
  check_scalar(found_inf, "check_finite_", "found_inf", ScalarType::Float, found_inf);
  const DeviceGuard guard(found_inf.get_device_index());
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_contiguous(), "check_finite_: tensors must be contiguous, got ", describe(t));
    check_device(found_inf, "check_finite_", "found_inf", t);
    const auto type = element_type(t.scalar_type(), "check_finite_", "tensors");
    STD_CUDA_CHECK(
        kernels::check_finite(t.const_data_ptr(), type, t.numel(), floats(found_inf), current_stream(found_inf)));
  }
}

void loss_scale_update_(Tensor scale, Tensor good_steps, Tensor updates, Tensor found_inf, double growth,
                        double backoff, int64_t interval) {
  check_loss_scale_state(scale, good_steps, updates, found_inf);
  const DeviceGuard guard(scale.get_device_index());
  STD_CUDA_CHECK(kernels::loss_scale_update(floats(scale), ints(good_steps), longs(updates), floats(found_inf),
                                            static_cast<float>(growth), static_cast<float>(backoff), interval,
                                            current_stream(scale)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("check_finite_", TORCH_BOX(&check_finite_));
  m.impl("loss_scale_update_", TORCH_BOX(&loss_scale_update_));
}

}  // namespace widedeep
