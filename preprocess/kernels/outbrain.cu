// Kernels of the Outbrain preprocessing, compiled by NVRTC when they are first used, so no header is included. One
// thread an element, in a loop over the grid; nothing is shared between threads. Sums run in the order of the numpy
// path and products are not contracted (--fmad=false), so both paths give the same bits.

typedef long long i64;
typedef unsigned long long u64;

#define FOR_EACH(i, n)                                                           \
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < (n); \
       i += static_cast<i64>(gridDim.x) * blockDim.x)

// The finaliser of splitmix64: core/hash.h and preprocess/hashing.py have the same.
__device__ __forceinline__ u64 mix64(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// out [n]: mix64(id ^ key), where key stands for the seed.
extern "C" __global__ void hash_ids(const i64* __restrict__ ids, i64 n, u64 key, u64* __restrict__ out) {
  FOR_EACH(i, n) out[i] = mix64(static_cast<u64>(ids[i]) ^ key);
}

// out [n]: the same modulo `buckets`.
extern "C" __global__ void id_buckets(const i64* __restrict__ ids, i64 n, u64 key, u64 buckets, int* __restrict__ out) {
  FOR_EACH(i, n) out[i] = static_cast<int>(mix64(static_cast<u64>(ids[i]) ^ key) % buckets);
}

// The first of the entries [low, high), which ascend, that is not below `wanted`; high if all are.
__device__ __forceinline__ i64 lower_bound(const int* __restrict__ attribute, i64 low, i64 high, int wanted) {
  while (low < high) {
    const i64 middle = (low + high) >> 1;
    if (attribute[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// out [n]: the sparse rows' dot products. left, right [n]: rows, -1 for the last one, which is empty. start, length,
// signature [rows]; attribute, value [entries]. The shorter row is walked; in the longer one each attribute is looked
// up among the entries behind the one found before, first the next, then by binary search. Both ways the common
// attributes come in ascending order.
extern "C" __global__ void similarity(const int* __restrict__ left, const int* __restrict__ right, i64 n,
                                      const i64* __restrict__ start, const i64* __restrict__ length,
                                      const u64* __restrict__ signature, const int* __restrict__ attribute,
                                      const double* __restrict__ value, double* __restrict__ out) {
  FOR_EACH(i, n) {
    double sum = 0;
    const int l = left[i], r = right[i];
    const u64 common = l < 0 || r < 0 ? 0 : signature[l] & signature[r];
    if (common != 0) {
      i64 a = start[l], b = start[r];
      i64 a_end = a + length[l], b_end = b + length[r];
      if (a_end - a > b_end - b) {
        const i64 other = a, other_end = a_end;
        a = b, a_end = b_end;
        b = other, b_end = other_end;
      }
      for (; a < a_end && b < b_end; ++a) {
        const int wanted = attribute[a];
        if ((common >> (wanted & 63) & 1) == 0) continue;
        if (attribute[b] < wanted) b = lower_bound(attribute, b + 1, b_end, wanted);
        if (b < b_end && attribute[b] == wanted) sum += value[a] * value[b++];
      }
    }
    out[i] = sum;
  }
}

// out [n]: sums of values [entries] from start[i] to the next start, from left to right. start ascends.
extern "C" __global__ void segment_sums(const double* __restrict__ values, i64 entries, const i64* __restrict__ start,
                                        i64 n, double* __restrict__ out) {
  FOR_EACH(i, n) {
    const i64 stop = i + 1 < n ? start[i + 1] : entries;
    double sum = 0;
    for (i64 e = start[i]; e < stop; ++e) sum += values[e];
    out[i] = sum;
  }
}

// out [n]: bit (a mod 64) is set for every attribute a of the segment.
extern "C" __global__ void segment_signatures(const int* __restrict__ attribute, i64 entries,
                                              const i64* __restrict__ start, i64 n, u64* __restrict__ out) {
  FOR_EACH(i, n) {
    const i64 stop = i + 1 < n ? start[i + 1] : entries;
    u64 bits = 0;
    for (i64 e = start[i]; e < stop; ++e) bits |= 1ull << (attribute[e] & 63);
    out[i] = bits;
  }
}
