// Device memory, and the checks of every load and store: the compiler calls them (-fsanitize=kernel-address), so they
// are not checked themselves. All device memory, dynamic shared memory too, lies in one range of addresses, of which is
// known what belongs to an array, byte by byte; accesses to other memory are let through.
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <new>

#include "emulator.h"

using emulator::kPage;
using emulator::map_pages;

uint8_t* emulator::map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<uint8_t*>(p);
}

#define UNCHECKED __attribute__((no_sanitize("kernel-address", "undefined")))

namespace {

constexpr size_t kRange = size_t{1} << 32;
constexpr size_t kPiece = 8;  // bytes that one number stands for

// Of the range, for the checks; before there is one, an address that no access comes near.
uintptr_t first_address = uintptr_t{1} << 63;
const uint8_t* usable_bytes = nullptr;

struct Allocation {
  size_t bytes, mapped;
};

struct Memory {
  uint8_t *range, *usable;  // usable [kRange / kPiece]: how many bytes of each piece belong to an array, the first ones
  size_t next = 0;
  std::map<uint8_t*, Allocation> allocations;  // by their base, an inaccessible page

  Memory() {
    void* const addresses = mmap(nullptr, kRange, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (addresses == MAP_FAILED) throw std::bad_alloc();
    range = static_cast<uint8_t*>(addresses);
    usable = map_pages(kRange / kPiece);
    usable_bytes = usable;
    first_address = reinterpret_cast<uintptr_t>(range);
  }

  // Addresses that nobody has; those just given back come last.
  uint8_t* find(size_t bytes) {
    for (int turns = 0; turns < 2;) {
      uint8_t* const base = range + next;
      if (next + bytes > kRange) {
        next = 0;
        ++turns;
        continue;
      }
      auto other = allocations.lower_bound(base + bytes);
      if (other == allocations.begin()) return take(base, bytes);
      --other;  // the last one that begins before their end
      uint8_t* const end = other->first + other->second.mapped;
      if (end <= base) return take(base, bytes);
      next = end - range;
    }
    throw std::bad_alloc();
  }

  uint8_t* take(uint8_t* base, size_t bytes) {
    next = base + bytes - range;
    return base;
  }

  void mark(uint8_t* start, size_t bytes, uint8_t whole) {
    uint8_t* const pieces = usable + (start - range) / kPiece;
    memset(pieces, whole, bytes / kPiece);
    if (bytes % kPiece) pieces[bytes / kPiece] = whole ? bytes % kPiece : 0;
  }
};

Memory* memory = nullptr;
Memory& made_memory() {
  if (!memory) memory = new Memory;
  return *memory;
}

[[noreturn]] void fail_access(const char* what) { emulator::fail(std::string(what) + " beside an array"); }

UNCHECKED inline void check(const void* address, size_t bytes, const char* what) {
  const size_t at = reinterpret_cast<uintptr_t>(address) - first_address;
  if (at >= kRange || bytes == 0) return;
  const size_t last = at + bytes - 1;
  if (usable_bytes[at / kPiece] <= at % kPiece || usable_bytes[last / kPiece] <= last % kPiece) fail_access(what);
}

}  // namespace

uint8_t* emulator::new_memory(size_t bytes, size_t room) {
  Memory& m = made_memory();
  const size_t used = (bytes + 15) / 16 * 16, pages = (used + kPage - 1) / kPage * kPage;
  const size_t mapped = (room > pages ? room : pages) + 2 * kPage;
  uint8_t* const base = m.find(mapped);
  if (mprotect(base + kPage, pages, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  uint8_t* const start = base + kPage + pages - used;
  memset(base + kPage, 0xFF, pages);
  m.mark(start, bytes, kPiece);
  m.allocations[base] = {bytes, mapped};
  return start;
}

bool emulator::free_memory(uint8_t* start) {
  Memory& m = made_memory();
  uint8_t* const base = start - reinterpret_cast<uintptr_t>(start) % kPage - kPage;
  const Allocation a = m.allocations.at(base);
  const size_t pages = (start + (a.bytes + 15) / 16 * 16) - (base + kPage);
  m.mark(base + kPage, pages, kPiece);
  bool clean = true;
  for (uint8_t* p = base + kPage; p < start; ++p) clean &= *p == 0xFF;
  for (uint8_t* p = start + a.bytes; p < base + kPage + pages; ++p) clean &= *p == 0xFF;
  m.mark(base + kPage, pages, 0);
  m.allocations.erase(base);
  // Given back to the system, and inaccessible again.
  mmap(base, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return clean;
}

void* emulator_allocate(size_t bytes) { return emulator::new_memory(bytes); }
int emulator_release(void* memory) { return emulator::free_memory(static_cast<uint8_t*>(memory)) ? 0 : 1; }

void emulator::check_access(const void* address, size_t bytes) { check(address, bytes, "access"); }

extern "C" {
#define CHECKED(bytes)                                                                    \
  UNCHECKED void __asan_load##bytes##_noabort(const void* p) { check(p, bytes, "load"); } \
  UNCHECKED void __asan_store##bytes##_noabort(const void* p) { check(p, bytes, "store"); }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)
UNCHECKED void __asan_loadN_noabort(const void* p, size_t bytes) { check(p, bytes, "load"); }
UNCHECKED void __asan_storeN_noabort(const void* p, size_t bytes) { check(p, bytes, "store"); }
// What the compiler would tell a runtime of its own.
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}
}
