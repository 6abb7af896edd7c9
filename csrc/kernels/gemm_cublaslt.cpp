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

namespace widedeep::kernels {
namespace {

constexpr int kProposals = 32;
constexpr float kPromising = 1.2f;  // of the shortest first run: what takes longer is not run again
// The others run in turn for so many milliseconds, and rounds: a card that is busy comes to its power limit, where
// others are the fastest than on a rested one.
constexpr float kBusy = 40.f;
constexpr int kRoundsLeast = 6, kRoundsMost = 40;
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

// Points of time on a stream.
class Marks {
 public:
  explicit Marks(cudaStream_t stream) : stream_(stream) {}
  Marks(const Marks&) = delete;
  ~Marks() {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  bool add() {
    cudaEvent_t event;
    if (cudaEventCreate(&event) != cudaSuccess) return false;
    events_.push_back(event);
    return cudaEventRecord(event, stream_) == cudaSuccess;
  }
  bool wait() const { return cudaEventSynchronize(events_.back()) == cudaSuccess; }
  float between(size_t i) const {  // the i-th and the next, in milliseconds
    float ms = INFINITY;
    cudaEventElapsedTime(&ms, events_[i], events_[i + 1]);
    return ms;
  }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

// Milliseconds of a run by itself, after one that loads the kernel; infinity when the algorithm does not run.
float first_time(const Call& call, const cublasLtMatmulAlgo_t& algorithm, cudaStream_t stream) {
  Marks marks(stream);
  for (int run = 0; run < 2; ++run)
    if (!marks.add() || call.run(algorithm, stream) != CUBLAS_STATUS_SUCCESS) return INFINITY;
  return marks.add() && marks.wait() ? marks.between(1) : INFINITY;
}

// Milliseconds of each proposal: of those whose first run is promising medians of runs in turn, one right behind the
// other; the first half of the rounds does not count.
std::vector<float> times_of(const Call& call, const std::vector<cublasLtMatmulHeuristicResult_t>& proposals,
                            cudaStream_t stream) {
  std::vector<float> times;
  for (const auto& proposal : proposals) times.push_back(first_time(call, proposal.algo, stream));
  const float limit = kPromising * *std::min_element(times.begin(), times.end());
  if (limit == INFINITY) return times;
  std::vector<size_t> promising;
  float round = 0.f;  // milliseconds
  for (size_t i = 0; i < times.size(); ++i) {
    if (times[i] <= limit)
      promising.push_back(i), round += times[i];
    else
      times[i] = INFINITY;
  }
  if (promising.size() == 1) return times;
  const int rounds = std::clamp(static_cast<int>(kBusy / round), kRoundsLeast, kRoundsMost);
  Marks marks(stream);
  bool ran = marks.add();
  for (int r = 0; r < rounds && ran; ++r)
    for (const size_t i : promising)
      ran = ran && call.run(proposals[i].algo, stream) == CUBLAS_STATUS_SUCCESS && marks.add();
  if (!ran || !marks.wait()) return times;
  for (size_t n = 0; n < promising.size(); ++n) {
    std::vector<float> runs;
    for (int r = rounds / 2; r < rounds; ++r) runs.push_back(marks.between(r * promising.size() + n));
    std::nth_element(runs.begin(), runs.begin() + runs.size() / 2, runs.end());
    times[promising[n]] = runs[runs.size() / 2];
  }
  return times;
}

cudaError_t fastest(const Call& call, cublasLtMatmulAlgo_t* chosen, bool* timed, cudaStream_t stream) {
  const auto found = proposals(call);
  if (found.empty()) return cudaErrorNotSupported;
  *chosen = found[0].algo;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &capturing)) return error;
  *timed = capturing == cudaStreamCaptureStatusNone;
  if (!*timed) return cudaSuccess;
  const std::vector<float> times = times_of(call, found, stream);
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
