// Hidden layers on Hopper, fused. Contracts: widedeep/ops/linear_sm90.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "bindings/pointers.h"
#include "bindings/stream.h"
#include "core/philox.h"
#include "kernels/gemm_sm90.h"
#include "kernels/linear_elementwise.h"

namespace widedeep {
namespace {

using Tensors = std::vector<Tensor>;

void check_mask(const Tensor& bits, const char* op, const char* name, std::initializer_list<int64_t> shape,
                const Tensor& like) {
  check(bits, op, name, ScalarType::Byte, shape, like);
  check_aligned(bits, op, name);
}

// The tiles of a chain wait for what they read, not for those who read what they overwrite.
void check_apart(const Tensor& input, const Tensors& outputs, const char* op, const char* name) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  const auto add = [&](const Tensor& t) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (t.numel() > 0) ranges.emplace_back(begin, begin + t.numel() * t.element_size());
  };
  add(input);
  for (const Tensor& output : outputs) add(output);
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    STD_TORCH_CHECK(ranges[i].first >= ranges[i - 1].second, op, ": the first argument and all of ", name,
                    " must lie apart, and two share memory");
}

// Layers of a chain: the input [M, K] of the first goes through weights [N, K], each N the K of the next.
core::DType check_chain(const Tensor& input, const Tensors& weights, const Tensors& outputs, const Tensors& masks,
                        const char* op, const char* name) {
  const core::DType dtype = element_type(input.scalar_type(), op, "the first argument");
  check(input, op, "the first argument", input.scalar_type(), {kAny, kAny}, input);
  STD_TORCH_CHECK(!weights.empty() && weights.size() <= kernels::kSm90Links, op, ": expected 1 to ",
                  kernels::kSm90Links, " weights, got ", weights.size());
  STD_TORCH_CHECK(outputs.size() == weights.size() && masks.size() <= weights.size(), op, ": expected ", weights.size(),
                  " of ", name, " and no more masks, got ", outputs.size(), " and ", masks.size());
  const int64_t M = input.size(0);
  int64_t K = input.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    check(weights[i], op, "a weight", input.scalar_type(), {kAny, K}, input);
    const int64_t N = weights[i].size(0);
    STD_TORCH_CHECK(N % 8 == 0 && K % 8 == 0, op, ": the layers' sizes must be multiples of 8, got weight ",
                    describe(weights[i]));
    check(outputs[i], op, name, input.scalar_type(), {M, N}, input);
    check_aligned(outputs[i], op, name);
    if (i < masks.size()) check_mask(masks[i], op, "a mask", {kernels::sm90_mask_bytes(M, N)}, input);
    K = N;
  }
  check_apart(input, outputs, op, name);
  return dtype;
}

void* pointer_of(const Tensors& list, size_t i) { return i < list.size() ? list[i].mutable_data_ptr() : nullptr; }

int rounds_of(int64_t rounds_ahead, const char* op) {
  STD_TORCH_CHECK(rounds_ahead >= 1 && rounds_ahead <= kernels::kMostRounds, op, ": expected rounds_ahead from 1 to ",
                  kernels::kMostRounds, ", got ", rounds_ahead);
  return static_cast<int>(rounds_ahead);
}

Tensor workspace_of(const Tensor& input, size_t links) {
  const int64_t bytes = kernels::sm90_workspace(input.size(0), static_cast<int>(links));
  return torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
}

void linear_sm90_out(Tensor x, Tensors weights, Tensors biases, double p, int64_t seed, Tensor step, int64_t layer,
                     int64_t first_row, int64_t rounds_ahead, Tensors y, Tensors masks) {
  const char* op = "linear_sm90";
  const core::DType dtype = check_chain(x, weights, y, masks, op, "y");
  STD_TORCH_CHECK(biases.size() == weights.size(), op, ": expected ", weights.size(), " biases, got ", biases.size());
  check_dropout(p, op);
  check_scalar(step, op, "step", ScalarType::Long, x);
  const auto count = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(layer >= 0 && layer + count <= 256, op, ": layers must be in [0, 256), got ", layer, " to ",
                  layer + count - 1);
  std::vector<kernels::ForwardSm90> links;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t N = weights[i].size(0);
    check(biases[i], op, "a bias", x.scalar_type(), {N}, x);
    links.push_back(
        {N, weights[i].const_data_ptr(), biases[i].const_data_ptr(), pointer_of(y, i), pointer_of(masks, i)});
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor workspace = workspace_of(x, links.size());
  const auto dropout = kernels::dropout_args(p, seed, step_of(step), layer, first_row);
  STD_CUDA_CHECK(kernels::linear_forward_sm90(x.const_data_ptr(), x.size(0), x.size(1), dtype, links.data(),
                                              static_cast<int>(count), dropout, rounds_of(rounds_ahead, op),
                                              workspace.mutable_data_ptr(), current_stream(x)));
}

void linear_sm90_dgrad_out(Tensor dz, Tensors weights_t, Tensors masks, double p, int64_t rounds_ahead, Tensors dx,
                           Tensors dbias, std::optional<Tensor> found_inf) {
  const char* op = "linear_sm90_dgrad";
  const core::DType dtype = check_chain(dz, weights_t, dx, masks, op, "dx");
  STD_TORCH_CHECK(dbias.size() <= masks.size(), op, ": expected a mask with each dbias, got ", masks.size(), " and ",
                  dbias.size());
  check_scalar(found_inf, op, "found_inf", ScalarType::Float, dz);
  STD_TORCH_CHECK(!(masks.size() == dx.size() && found_inf.has_value()), op, ": found_inf goes with a dx without mask");
  STD_TORCH_CHECK(!found_inf.has_value() || dtype != core::DType::f32, op, ": found_inf goes with half types");
  check_dropout(p, op);
  const DeviceGuard guard(dz.get_device_index());
  const int64_t M = dz.size(0), strips = kernels::sm90_strips(M);
  Tensors sums;
  std::vector<kernels::GradientSm90> links;
  std::vector<kernels::StripSums> totals;
  for (size_t i = 0; i < weights_t.size(); ++i) {
    const int64_t N = weights_t[i].size(0);
    if (i < dbias.size()) {
      check(dbias[i], op, "dbias", ScalarType::Float, {N}, dz);
      sums.push_back(torch::stable::new_empty(dz, {strips, N}, ScalarType::Float));
      totals.push_back({static_cast<float*>(pointer_of(sums, i)), static_cast<float*>(pointer_of(dbias, i)), N});
    }
    links.push_back({N, weights_t[i].const_data_ptr(), pointer_of(masks, i), pointer_of(dx, i),
                     static_cast<float*>(pointer_of(sums, i))});
  }
  const Tensor workspace = workspace_of(dz, links.size());
  auto* found = floats(found_inf);
  const cudaStream_t stream = current_stream(dz);
  STD_CUDA_CHECK(kernels::linear_dgrad_sm90(dz.const_data_ptr(), M, dz.size(1), dtype, links.data(),
                                            static_cast<int>(links.size()), core::dropout_scale(p), found,
                                            rounds_of(rounds_ahead, op), workspace.mutable_data_ptr(), stream));
  STD_CUDA_CHECK(kernels::add_strips(totals.data(), static_cast<int>(totals.size()), strips, stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widedeep, CUDA, m) {
  m.impl("linear_sm90_out", TORCH_BOX(&linear_sm90_out));
  m.impl("linear_sm90_dgrad_out", TORCH_BOX(&linear_sm90_dgrad_out));
}

}  // namespace widedeep
