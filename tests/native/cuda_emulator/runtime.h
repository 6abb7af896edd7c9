// What launches use of the runtime. Included by emulator.cpp and runtime.cpp alone.
#pragma once
#include <cstddef>
#include <string>

namespace emulator {

constexpr size_t kMostShared = 232448;  // of a Hopper block that opts in

// What launchers have asked of the runtime since the last launch.
struct Asked {
  size_t shared = 0;      // dynamic shared memory
  bool together = false;  // how many clusters run at a time
};
Asked take_asked();

// The launch failed; the first message since emulator_seed stays.
void note_failure(const std::string& message);

}  // namespace emulator
