// Runs CUDA kernels on the processor, one fiber for each thread. A fiber runs until it has to wait for others; which
// one runs next is drawn at random from a seed, some lagging behind, so that a missing barrier shows as a wrong result
// in some order. What never gets to run again is a deadlock, reported with the kernel and the threads. Device memory
// comes from emulator_allocate; a load or store beside one of its arrays, or beside dynamic shared memory, ends the
// launch. Shared memory starts as NaNs.
//
// Not shown here: memory ordering, what a launch that may begin early reads before it waits, time, registers, and code
// that runs in lockstep only by luck.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Block;
struct Fiber;

// Asynchronous copies into shared memory (cuda_pipeline_primitives.h): those since the last commit, and groups of them.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// What the running thread knows of itself.
struct Thread {
  uint3 index;
  int number;  // within the block
  Block* block;
  Fiber* fiber;
  const char* doing;  // for reports
  Copies copies;
  bool waited;  // for the kernel before
};

// Threads that meet: each waits until `expected` have come, then all go on.
struct Meeting {
  int expected = 0, arrived = 0;
  const char* what = nullptr;
  std::vector<Thread*> waiting;
};

struct Warp {
  Meeting meeting;
  uint64_t given[32], taken[32];
};

// Blocks that can reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  Meeting all;
};

struct Block {
  uint3 index;
  Cluster* cluster;
  int rank, size, live;       // rank: within the cluster; live: threads that have not returned
  uint8_t *window, *dynamic;  // the block's shared address space starts at window
  size_t dynamic_bytes;
  std::vector<Warp> warps;
  Meeting all, named[16];
  bool any;  // __syncthreads_or
};

struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t shared;
  unsigned cluster = 1;
  size_t allowed_shared = 0;
  bool together = false;  // all clusters run at a time, and may wait for each other; else one after the other
  bool early = false;     // it may begin before the kernel before has ended
};

extern Thread* current;
extern Launch launch;  // the one that runs

// Runs all blocks of a grid. Errors stay for cudaGetLastError and emulator_message.
void run(const Launch& launch, const std::function<void()>& kernel);

// Ends the launch with a message that names kernel, block and thread.
[[noreturn]] void fail(const std::string& what);

// Waits for the other threads of the meeting; all of a meeting must be doing the same thing.
void meet(Meeting& meeting, const char* what);
// Waits until ready() holds; it is asked again after every change().
void wait_until(const std::function<bool()>& ready, const char* what);
void change();
// Something that the hardware does by itself at some later time.
void later(std::function<void()> event);
uint64_t random_number();

Warp& warp();
inline int lane() { return current->number % 32; }
void meet_warp(const char* what);

// A static variable that stands for one of the running block: NaNs when a block starts.
void shared_variable(void* address, size_t bytes);

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(current->block->dynamic);
}

// Bytes of the block's shared memory by their address, an offset into its window.
inline uint8_t* shared_at(const Block& block, uint32_t address, size_t bytes) {
  uint8_t* const p = block.window + address;
  if (p < block.dynamic || p + bytes > block.dynamic + block.dynamic_bytes) fail("address outside of shared memory");
  return p;
}

constexpr size_t kPage = 4096;
uint8_t* map_pages(size_t bytes);

// Bytes 0xFF whose end (to 16 bytes) meets an inaccessible page; every access beside them fails. The page before them
// is inaccessible too, and `room` reserves more addresses behind them.
uint8_t* new_memory(size_t bytes, size_t room = 0);
bool free_memory(uint8_t* start);  // false: something was written beside them
// For copies, which the compiler does not check.
void check_access(const void* address, size_t bytes);

// A launch as kernel<<<grid, block, shared, stream>>> names it.
struct Call {
  Launch launch;
  Call(const char* kernel, dim3 grid, dim3 block, size_t shared = 0, void* = nullptr);
  template <typename F>
  void operator()(F kernel) const {
    run(launch, kernel);
  }
};

// Value of every lane, after all have given theirs.
template <typename T, typename F>
T exchange(unsigned mask, T value, const char* what, F source) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) fail(std::string(what) + " with a partial mask is not emulated");
  Warp& w = warp();
  w.given[lane()] = 0;
  __builtin_memcpy(&w.given[lane()], &value, sizeof(T));
  meet_warp(what);
  const uint64_t got = w.given[source(lane()) & 31];
  meet_warp(what);  // nobody gives anew before all have read
  T result;
  __builtin_memcpy(&result, &got, sizeof(T));
  return result;
}

}  // namespace emulator

extern "C" {
// Of new_memory and free_memory.
void* emulator_allocate(size_t bytes);
int emulator_release(void* memory);
// What decides the order of threads and blocks from now on, and the size of the device; forgets earlier errors.
void emulator_seed(uint64_t seed, int64_t multiprocessors);
const char* emulator_message();
// Of the calls of the runtime from now on, the one of this number is refused, counted from 0; below 0 none.
void emulator_refuse(int64_t call);
// What cudaGetLastError would say.
int emulator_last_error();
}
