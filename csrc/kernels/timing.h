// How long each of several pieces of work takes on a stream of a busy card. Included by gemm_cublaslt.cpp alone.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace widedeep::kernels {

constexpr float kPromising = 1.2f;  // of the shortest first run: what takes longer is not run again
// The others run in turn for so many milliseconds, and rounds: a busy card reaches its power limit, where another one
// may be the fastest than on a rested card.
constexpr float kBusy = 40.f;
constexpr int kRoundsLeast = 6, kRoundsMost = 40;

// Puts piece i on the stream; false when it does not run.
using Run = std::function<bool(size_t)>;

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

// Milliseconds of a run by itself, after one that loads the kernel; infinity when it does not run.
inline float first_time(const Run& run, size_t i, cudaStream_t stream) {
  Marks marks(stream);
  for (int n = 0; n < 2; ++n)
    if (!marks.add() || !run(i)) return INFINITY;
  return marks.add() && marks.wait() ? marks.between(1) : INFINITY;
}

// Milliseconds of each of `count`: of those whose first run is promising medians of runs in turn, one right behind the
// other, of which the first half of the rounds does not count; of all others infinity.
inline std::vector<float> times_in_turn(size_t count, const Run& run, cudaStream_t stream) {
  std::vector<float> times;
  for (size_t i = 0; i < count; ++i) times.push_back(first_time(run, i, stream));
  const float limit = kPromising * *std::min_element(times.begin(), times.end());
  if (limit == INFINITY) return times;
  std::vector<size_t> promising;
  float round = 0.f;  // milliseconds
  for (size_t i = 0; i < count; ++i) {
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
    for (const size_t i : promising) ran = ran && run(i) && marks.add();
  if (!ran || !marks.wait()) return times;
  for (size_t n = 0; n < promising.size(); ++n) {
    std::vector<float> runs;
    for (int r = rounds / 2; r < rounds; ++r) runs.push_back(marks.between(r * promising.size() + n));
    std::nth_element(runs.begin(), runs.begin() + runs.size() / 2, runs.end());
    times[promising[n]] = runs[runs.size() / 2];
  }
  return times;
}

}  // namespace widedeep::kernels
