// 64-bit integer mixing, for hash buckets of ids and for the keys of the epoch permutation. All arithmetic is modulo
// 2^64.
//
// mix64(z): z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
//
// absorb(h, v): mix64(h + v + 0x9E3779B97F4A7C15)
//
// id_bucket(value, seed, buckets): mix64(value ^ absorb(0, seed)) mod buckets, an unsigned 64-bit modulo
//
// Negative integers enter as their two's complement. mix64 is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast
// Splittable Pseudorandom Number Generators", OOPSLA 2014); it is a bijection. The numpy twin for preprocessing is
// preprocess/hashing.py: the two give the same buckets.
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

WD_HOST_DEVICE inline uint64_t id_bucket(uint64_t value, uint64_t seed, uint64_t buckets) {
  return mix64(value ^ absorb(0, seed)) % buckets;
}

}  // namespace widedeep::core
