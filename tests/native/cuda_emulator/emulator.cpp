// Launches: the memory of blocks, which of them run together, limits and failures.
#include "emulator.h"

#include <setjmp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

#include "fibers.h"
#include "order.h"
#include "runtime.h"
#include "signals.h"

namespace emulator {

constexpr size_t kWindow = 256 * 1024;

Launch launch;

namespace {

bool running = false;
jmp_buf failure;
struct SharedVariable {
  void* address;
  size_t bytes;
};
std::vector<SharedVariable> shared_variables;

// What shared memory holds at first, by turns: whole numbers of -1 and floats that are NaN, or large ones of either.
int leftover = 0xFF;

// A block of the cluster: its dynamic shared memory ends where an inaccessible page begins.
struct BlockMemory {
  Block block;
  explicit BlockMemory(size_t shared) {
    block.dynamic = new_memory(shared, kWindow);
    block.window = block.dynamic - reinterpret_cast<uintptr_t>(block.dynamic) % kPage;
    block.dynamic_bytes = shared;
  }
  ~BlockMemory() { free_memory(block.dynamic); }
};

void prepare(Block& b, uint3 index, Cluster& cluster, int rank, int threads) {
  b.index = index;
  b.cluster = &cluster;
  b.rank = rank;
  b.size = b.live = threads;
  b.all = {};
  b.all.expected = threads;
  for (Meeting& m : b.named) m = {};
  b.warps.assign((threads + 31) / 32, {});
  for (size_t w = 0; w < b.warps.size(); ++w) b.warps[w].meeting.expected = 32;
  if (b.dynamic_bytes > 0) memset(b.dynamic, leftover, b.dynamic_bytes);
}

// Clusters that run at a time, and what they have of their own.
struct Group {
  std::vector<std::unique_ptr<BlockMemory>> memory;
  std::vector<Cluster> clusters;

  explicit Group(size_t count) : clusters(count) {
    for (Cluster& cluster : clusters)
      for (unsigned r = 0; r < launch.cluster; ++r) {
        memory.push_back(std::make_unique<BlockMemory>(launch.shared));
        cluster.blocks.push_back(&memory.back()->block);
      }
  }
};

// first: the number of each cluster's first block.
void run_group(Group& group, const uint64_t* first, const std::function<void()>& kernel) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  for (auto& v : shared_variables) memset(v.address, leftover, v.bytes);
  size_t next = 0;
  for (Cluster& cluster : group.clusters) {
    cluster.all = {};
    cluster.all.expected = threads * static_cast<int>(cluster.blocks.size());
    for (size_t r = 0; r < cluster.blocks.size(); ++r) {
      const uint64_t b = *first + r;
      prepare(*cluster.blocks[r],
              {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / grid.x / grid.y)},
              cluster, static_cast<int>(r), threads);
      for (int t = 0; t < threads; ++t) {
        const auto u = static_cast<unsigned>(t);
        add_thread(next++, {u % block.x, u / block.x % block.y, u / block.x / block.y}, t, cluster.blocks[r]);
      }
    }
    ++first;
  }
  run_fibers(kernel);
}

[[noreturn]] void too_much_shared(size_t bytes) {
  fail(std::to_string(bytes) + " bytes of shared memory where " + std::to_string(launch.allowed_shared) +
       " are allowed");
}

void check_limits() {
  const dim3 &g = launch.grid, &b = launch.block;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535 || g.x > INT32_MAX || threads == 0 ||
      threads > 1024 || g.x % launch.cluster != 0)
    fail("launch with a grid of (" + std::to_string(g.x) + "," + std::to_string(g.y) + "," + std::to_string(g.z) +
         ") blocks of " + std::to_string(threads) + " threads");
  if (launch.shared > launch.allowed_shared) too_much_shared(launch.shared);
}

}  // namespace

void fail(const std::string& what) {
  if (!running) {  // outside of a kernel: in a launcher, or in what stands for a library
    fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
    abort();
  }
  std::string message = launch.kernel + ": " + what;
  if (current) message += " by " + name_of(*current) + ", last seen in " + (current->doing ? current->doing : "?");
  note_failure(message);
  _longjmp(failure, 1);
}

void run(const Launch& what, const std::function<void()>& kernel) {
  launch = what;
  const Asked asked = take_asked();
  launch.allowed_shared = asked.shared >= launch.shared && asked.shared > 0 ? kMostShared : 48 * 1024;
  launch.together = asked.together;
  shared_variables.clear();
  leftover ^= 0xFF ^ 0x7F;
  static std::optional<Group> group;  // static: a failure leaves by a jump
  group.reset();
  const Signals signals;
  running = true;
  if (_setjmp(failure) == 0) {
    check_limits();
    std::vector<uint64_t> order(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / launch.cluster);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i * launch.cluster;
    std::shuffle(order.begin(), order.end(), generator());
    const size_t at_a_time = launch.together ? order.size() : 1;
    group.emplace(at_a_time);
    for (size_t i = 0; i < order.size(); i += at_a_time) run_group(*group, &order[i], kernel);
  } else {
    forget_fibers();
  }
  running = false;
  current = nullptr;
}

void shared_variable(void* address, size_t bytes) {
  size_t total = bytes + launch.shared;  // static and dynamic
  for (const auto& v : shared_variables) {
    if (v.address == address) return;
    total += v.bytes;
  }
  if (launch.cluster > 1 || launch.together)
    fail("static shared variables of blocks that run together are not emulated");
  if (total > launch.allowed_shared) too_much_shared(total);
  memset(address, leftover, bytes);
  shared_variables.push_back({address, bytes});
}

Call::Call(const char* kernel, dim3 grid, dim3 block, size_t shared, void*) : launch{kernel, grid, block, shared} {}

}  // namespace emulator
