// cuBLASLt's products: every algorithm that it proposes is timed once a shape, and the fastest kept.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/gemm_cublaslt_plan.h"
#include "kernels/timing.h"

namespace widedeep::kernels {
namespace {

constexpr int kProposals = 32;
constexpr float kAsGood = 1.01f;  // noise of the clock: within it the library's order decides, so that runs repeat

cudaError_t to_cuda(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return cudaSuccess;
    case CUBLAS_STATUS_ALLOC_FAILED:
      return cudaErrorMemoryAllocation;
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return cudaErrorNotSupported;
    case CUBLAS_STATUS_INVALID_VALUE:
      return cudaErrorInvalidValue;
    default:
      return cudaErrorUnknown;
  }
}

// The largest power of two up to 256 that divides the address: algorithms are chosen for it.
uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

struct Call {
  cublasLtHandle_t handle;
  const Plan& plan;
  const void *first, *second;
  void *d, *workspace;

  uint32_t alignment() const { return std::min({alignment_of(first), alignment_of(second), alignment_of(d)}); }

  cublasStatus_t run(const cublasLtMatmulAlgo_t& algorithm, cudaStream_t stream) const {
    const float one = 1.f, zero = 0.f;
    return cublasLtMatmul(handle, plan.operation, &one, first, plan.first, second, plan.second, &zero, d, plan.d, d,
                          plan.d, &algorithm, workspace, kGemmWorkspace, stream);
  }
};

std::vector<cublasLtMatmulHeuristicResult_t> proposals(const Call& call) {
  std::vector<cublasLtMatmulHeuristicResult_t> found(kProposals);
  cublasLtMatmulPreference_t preference = nullptr;
  int count = 0;
  if (cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS) {
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kGemmWorkspace,
                                         sizeof kGemmWorkspace);
    const uint32_t alignment = call.alignment();
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof alignment);
    const Plan& p = call.plan;
    if (cublasLtMatmulAlgoGetHeuristic(call.handle, p.operation, p.first, p.second, p.d, p.d, preference, kProposals,
                                       found.data(), &count) != CUBLAS_STATUS_SUCCESS)
      count = 0;
    cublasLtMatmulPreferenceDestroy(preference);
  }
  found.resize(count);
  return found;
}

cudaError_t fastest(const Call& call, cublasLtMatmulAlgo_t* chosen, bool* timed, cudaStream_t stream) {
  const auto found = proposals(call);
  if (found.empty()) return cudaErrorNotSupported;
  *chosen = found[0].algo;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &capturing)) return error;
  *timed = capturing == cudaStreamCaptureStatusNone;
  if (!*timed) return cudaSuccess;
  const auto run = [&](size_t i) { return call.run(found[i].algo, stream) == CUBLAS_STATUS_SUCCESS; };
  const std::vector<float> times = times_in_turn(found.size(), run, stream);
  const float best = *std::min_element(times.begin(), times.end());
  if (best == INFINITY) return cudaErrorNotSupported;
  const auto first = std::find_if(times.begin(), times.end(), [best](float ms) { return ms <= kAsGood * best; });
  *chosen = found[first - times.begin()].algo;
  return cudaSuccess;
}

using Key = std::tuple<int, Product, int64_t, int64_t, int64_t, core::DType, core::DType, bool, bool, uint32_t>;

// One handle and one set of choices for each device, kept for the life of the process.
struct Cache {
  std::mutex lock;
  std::map<int, cublasLtHandle_t> handles;
  std::map<Key, cublasLtMatmulAlgo_t> chosen;
};

Cache& cache() {
  static Cache* kept = new Cache;  // never destroyed: at exit the CUDA context may be gone before us
  return *kept;
}

}  // namespace

cudaError_t gemm(const Gemm& g, const void* a, const void* b, const void* bias, void* d, void* workspace,
                 cudaStream_t stream) {
  if (g.O == 0 || g.I == 0 || (g.B == 0 && g.product != Product::wgrad)) return cudaSuccess;
  if (g.B == 0) return cudaMemsetAsync(d, 0, g.O * g.I * bytes_of(g.result), stream);
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  Plan plan;
  if (const auto status = plan.make(g, bias)) return to_cuda(status);
  Cache& kept = cache();
  const std::lock_guard<std::mutex> guard(kept.lock);
  cublasLtHandle_t& handle = kept.handles[device];
  if (!handle)
    if (const auto status = cublasLtCreate(&handle)) return to_cuda(status);
  // In columns every product reads b first.
  const Call call{handle, plan, b, a, d, workspace};
  const Key key{device, g.product, g.B, g.I, g.O, g.operands, g.result, g.tf32, g.bias_relu, call.alignment()};
  auto found = kept.chosen.find(key);
  cublasLtMatmulAlgo_t algorithm;
  if (found != kept.chosen.end()) {
    algorithm = found->second;
  } else {
    bool timed = false;
    if (const cudaError_t error = fastest(call, &algorithm, &timed, stream)) return error;
    if (timed) kept.chosen.emplace(key, algorithm);
  }
  return to_cuda(call.run(algorithm, stream));
}

}  // namespace widedeep::kernels
