// 64-bit integer mixing, for the rounds and keys of the epoch permutation. All arithmetic is modulo 2^64.
//
// mix64(z): z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
//
// absorb(h, v): mix64(h + v + 0x9E3779B97F4A7C15)
//
// Negative integers enter as their two's complement. mix64 is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast
// Splittable Pseudorandom Number Generators", OOPSLA 2014); it is a bijection. The numpy twin is widedeep/splitmix.py.
#pragma once
#include <cstdint>

#include "core/macros.h"

namespace widedeep::core {

WD_HOST_DEVICE inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

WD_HOST_DEVICE inline uint64_t absorb(uint64_t h, uint64_t v) { return mix64(h + v + 0x9E3779B97F4A7C15ull); }

}  // namespace widedeep::core
