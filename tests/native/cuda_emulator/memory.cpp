// Device memory between inaccessible pages.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "emulator.h"

using emulator::kPage;
using emulator::map_pages;

namespace {
struct Allocation {
  size_t bytes, mapped;
  uint8_t* base;
};
std::map<void*, Allocation>& allocations() {
  static std::map<void*, Allocation> all;
  return all;
}
}  // namespace

void* emulator_allocate(size_t bytes) {
  const size_t used = (bytes + 15) / 16 * 16, pages = (used + kPage - 1) / kPage * kPage;
  const size_t mapped = pages + 2 * kPage;
  uint8_t* const base = map_pages(mapped);
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + pages, kPage, PROT_NONE);
  memset(base + kPage, 0xFF, pages);
  uint8_t* const start = base + kPage + pages - used;
  allocations()[start] = {bytes, mapped, base};
  return start;
}

int emulator_release(void* memory) {
  const Allocation a = allocations().at(memory);
  auto* const start = static_cast<uint8_t*>(memory);
  bool clean = true;
  for (uint8_t* p = a.base + kPage; p < start; ++p) clean &= *p == 0xFF;
  for (uint8_t* p = start + a.bytes; p < a.base + a.mapped - kPage; ++p) clean &= *p == 0xFF;
  allocations().erase(memory);
  munmap(a.base, a.mapped);
  return clean ? 0 : 1;
}
