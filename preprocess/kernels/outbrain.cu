// Kernels of the Outbrain preprocessing, compiled by NVRTC when they are first used, so no header is included. One
// thread an element, in a loop over the grid. Sums run in the order of the numpy path and products are not contracted
// (--fmad=false), so both paths give the same bits; only integers are added by atomics.

typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
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

// out [n]: mix64(id ^ key) mod buckets, where key stands for the seed; -1 for a null.
extern "C" __global__ void id_buckets(const int* __restrict__ ids, i64 n, u64 key, u64 buckets, int* __restrict__ out) {
  FOR_EACH(i, n) {
    const int id = ids[i];
    out[i] = id < 0 ? -1 : static_cast<int>(mix64(static_cast<u64>(id) ^ key) % buckets);
  }
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
                                      const double* __restrict__ value, float* __restrict__ out) {
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
    out[i] = static_cast<float>(sum);
  }
}

// out [n]: the row of each key, -1 if it is null or unknown. Direct address if there are no table keys: slots [size] by
// key, the last one -1. Else table_keys ascend, and slots[i] is the row of table_keys[i].
extern "C" __global__ void find(const int* __restrict__ keys, i64 n, const int* __restrict__ table_keys, i64 table_size,
                                const int* __restrict__ slots, i64 size, int* __restrict__ out) {
  FOR_EACH(i, n) {
    const int key = keys[i];
    int row = -1;
    if (table_size == 0) {
      if (key >= 0 && key < size) row = slots[key];
    } else {
      const i64 at = lower_bound(table_keys, 0, table_size, key);
      if (at < table_size && table_keys[at] == key) row = slots[at];
    }
    out[i] = row;
  }
}

// out [n, width]: rows of column [size, width]; row -1 is the last one.
template <typename T>
__device__ __forceinline__ void take(const T* __restrict__ column, i64 size, i64 width, const int* __restrict__ rows,
                                     i64 n, T* __restrict__ out) {
  FOR_EACH(i, n) {
    const i64 row = rows[i] < 0 ? size - 1 : rows[i];
    for (i64 k = 0; k < width; ++k) out[i * width + k] = column[row * width + k];
  }
}
extern "C" __global__ void take_1(const u8* column, i64 size, i64 width, const int* rows, i64 n, u8* out) {
  take(column, size, width, rows, n, out);
}
extern "C" __global__ void take_2(const u16* column, i64 size, i64 width, const int* rows, i64 n, u16* out) {
  take(column, size, width, rows, n, out);
}
extern "C" __global__ void take_4(const u32* column, i64 size, i64 width, const int* rows, i64 n, u32* out) {
  take(column, size, width, rows, n, out);
}
extern "C" __global__ void take_8(const u64* column, i64 size, i64 width, const int* rows, i64 n, u64* out) {
  take(column, size, width, rows, n, out);
}

// Adds how many of its threads say yes, once a warp. All threads of the block take part.
__device__ __forceinline__ void tally(bool yes, u64* count) {
  const unsigned votes = __ballot_sync(0xffffffffu, yes);
  if (votes != 0 && (threadIdx.x & 31) == 0) atomicAdd(count, static_cast<u64>(__popc(votes)));
}

// out [n]: the ids in a narrower type, `null_id` for those below 0, whose number is added to nulls [1].
template <typename T>
__device__ __forceinline__ void fill(const int* __restrict__ ids, i64 n, int null_id, T* __restrict__ out, u64* nulls) {
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.x; first < n;
       first += static_cast<i64>(gridDim.x) * blockDim.x) {
    const i64 i = first + threadIdx.x;
    const bool missing = i < n && ids[i] < 0;
    if (i < n) out[i] = static_cast<T>(missing ? null_id : ids[i]);
    tally(missing, nulls);
  }
}
extern "C" __global__ void fill_1(const int* ids, i64 n, int null_id, u8* out, u64* nulls) {
  fill(ids, n, null_id, out, nulls);
}
extern "C" __global__ void fill_2(const int* ids, i64 n, int null_id, u16* out, u64* nulls) {
  fill(ids, n, null_id, out, nulls);
}
extern "C" __global__ void fill_4(const int* ids, i64 n, int null_id, u32* out, u64* nulls) {
  fill(ids, n, null_id, out, nulls);
}

// out [n]: whole days from publication to event, 0 if negative or above `most`, most + 1 if a time is missing, of which
// there are nulls [1] more. timestamp: ms since the origin, -1 = null; published: Unix ms, the least number = null.
extern "C" __global__ void age_in_days(const i64* __restrict__ timestamp, const i64* __restrict__ published, i64 n,
                                       i64 origin, i64 day, i64 most, int* __restrict__ out, u64* nulls) {
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.x; first < n;
       first += static_cast<i64>(gridDim.x) * blockDim.x) {
    const i64 i = first + threadIdx.x;
    const bool missing = i < n && (timestamp[i] < 0 || published[i] == -0x7fffffffffffffffll - 1);
    if (i < n) {
      // Towards zero, so that less than a day before publication is 0 as well.
      const i64 days = missing ? most + 1 : (timestamp[i] + origin - published[i]) / day;
      out[i] = missing || (days >= 0 && days <= most) ? static_cast<int>(days) : 0;
    }
    tally(missing, nulls);
  }
}

// counts [bins <= 4096]: how often each value occurs, if chosen is there among those with chosen[i] != 0. A block
// counts for itself first, so that the few values that most rows have are not one address for all of them.
extern "C" __global__ void count(const int* __restrict__ values, const u8* __restrict__ chosen, i64 n, int bins,
                                 u64* counts) {
  __shared__ u32 own[4096];
  for (int k = threadIdx.x; k < bins; k += blockDim.x) own[k] = 0;
  __syncthreads();
  FOR_EACH(i, n) {
    if (chosen == nullptr || chosen[i]) atomicAdd(own + values[i], 1u);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < bins; k += blockDim.x) {
    if (own[k] != 0) atomicAdd(counts + k, static_cast<u64>(own[k]));
  }
}
