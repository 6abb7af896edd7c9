// What launches use of the scheduler. Included by emulator.cpp and fibers.cpp alone.
#pragma once
#include <functional>
#include <string>

#include "emulator.h"

namespace emulator {

// Number `at` of the threads that run together; it begins at the next run_fibers.
void add_thread(size_t at, uint3 index, int number, Block* block);

// Each thread does `kernel`, until all have returned.
void run_fibers(const std::function<void()>& kernel);

// After a failure: what has not come to its end never will.
void forget_fibers();

std::string name_of(const Thread& t);

}  // namespace emulator
