// Asynchronous copies into shared memory. What has not been waited for is not there: the target holds NaNs until then.
#pragma once
#include <cstring>

#include "emulator.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  const bool whole = (bytes == 4 || bytes == 8 || bytes == 16) && reinterpret_cast<uintptr_t>(to) % bytes == 0 &&
                     reinterpret_cast<uintptr_t>(from) % bytes == 0;
  if (!whole) emulator::fail("__pipeline_memcpy_async: size or alignment");
  emulator::check_access(from, bytes - zeros);
  emulator::check_access(to, bytes);
  std::memset(to, 0xFF, bytes);
  emulator::current->copies.open.push_back({to, from, bytes, zeros});
}
inline void __pipeline_commit() {
  auto& copies = emulator::current->copies;
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = emulator::current->copies.groups;
  for (; groups.size() > left; groups.pop_front())
    for (const emulator::Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, c.bytes - c.zeros);
      std::memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    }
}
