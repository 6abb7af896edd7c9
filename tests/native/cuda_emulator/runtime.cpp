// The CUDA runtime: its errors, what launchers ask of it, calls that it refuses; and what tests say to the emulator.
#include "runtime.h"

#include "cuda_runtime.h"
#include "order.h"

using namespace emulator;

namespace {

std::string message;
cudaError_t last_error = cudaSuccess;
Asked asked;
int64_t until_refused = -1;  // calls of the runtime

}  // namespace

Asked emulator::take_asked() {
  const Asked taken = asked;
  asked = {};
  return taken;
}

void emulator::note_failure(const std::string& what) {
  if (message.empty()) message = what;
  last_error = cudaErrorLaunchFailure;
}

int emulator_multiprocessors = 132;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t emulator_answer() {
  if (until_refused-- != 0) return cudaSuccess;
  return last_error = cudaErrorNotSupported;
}

cudaError_t emulator_function_attribute(int bytes) {
  if (const cudaError_t error = emulator_answer()) return error;
  if (bytes > static_cast<int>(kMostShared)) return cudaErrorInvalidValue;
  asked.shared = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t emulator_ask_together() {
  asked.together = true;
  return emulator_answer();
}

void emulator_seed(uint64_t seed, int64_t multiprocessors) {
  emulator_multiprocessors = static_cast<int>(multiprocessors);
  generator().seed(seed);
  message.clear();
  last_error = cudaSuccess;
}

void emulator_refuse(int64_t call) { until_refused = call; }

int emulator_last_error() { return last_error; }

const char* emulator_message() { return message.c_str(); }
