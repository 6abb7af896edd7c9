// The Hopper instructions that CUDA C++ has no words for: mbarriers, the bulk tensor copy engine (TMA), wgmma. sm_90a
// only. Semantics: PTX ISA 8, sections "mbarrier", "cp.async.bulk.tensor" and "wgmma.mma_async".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace widedeep::kernels::sm90 {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// What the thread has read and written so far is done for those who see the phase complete.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The shared memory at the same offset in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// A predicated arrival on a barrier of any block of the cluster.
__device__ __forceinline__ void barrier_arrive_remote_if(uint32_t remote, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n}\n" ::"r"(remote),
      "r"(static_cast<int>(wanted))
      : "memory");
}

__device__ __forceinline__ uint32_t clock_seconds() {  // about two seconds a tick: 2^32 cycles
  uint32_t ticks;
  asm volatile("mov.u32 %0, %%clock_hi;" : "=r"(ticks));
  return ticks;
}

// A wait of about a minute is a fault: the launch ends with an error, not never. Less would not do: blocks of a chain
// may wait for one that has yet to get a multiprocessor.
constexpr uint32_t kPatience = 24;
constexpr uint32_t kAsleep = 10'000'000;  // nanoseconds that a waiting warp may sleep at most before it looks again

// In one piece, since the compiler would have the threads of a warp meet again after a loop of its own.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 since, now;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %3;\n@p bra DONE;\n"
      "mov.u32 since, %%clock_hi;\n"
      "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %3;\n@p bra DONE;\n"
      "mov.u32 now, %%clock_hi;\nsub.u32 now, now, since;\nsetp.le.u32 p, now, %2;\n@p bra AGAIN;\n"
      "trap;\nDONE:\n}\n" ::"r"(barrier),
      "r"(parity), "n"(kPatience), "r"(kAsleep)
      : "memory");
}

// Counters in global memory order what blocks store and other blocks then load by the bulk copy engine. Counts the
// stores that the thread has made, or knows of by a barrier, as done.
__device__ __forceinline__ void counter_arrive(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ int32_t counter_value(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Whether so much is counted; copies that this thread then issues, or one that learns of it, come after the stores.
__device__ __forceinline__ bool counter_reached(const int32_t* counter, int32_t wanted) {
  if (counter_value(counter) < wanted) return false;
  asm volatile("fence.proxy.async.global;" ::: "memory");
  return true;
}

__device__ __forceinline__ void counter_wait(const int32_t* counter, int32_t wanted) {
  const uint32_t since = clock_seconds();
  while (!counter_reached(counter, wanted))
    if (clock_seconds() - since > kPatience) __trap();
}

// A number in shared memory by which a thread tells another one of its block what it knows.
__device__ __forceinline__ void note_tell(int32_t* note, int32_t value) {
  asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" ::"r"(smem_address(note)), "r"(value) : "memory");
}

__device__ __forceinline__ int32_t note_read(const int32_t* note) {
  int32_t value;
  asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(value) : "r"(smem_address(note)) : "memory");
  return value;
}

__device__ __forceinline__ void pause(uint32_t cycles) {
  uint32_t start, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(start));
  do asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  while (now - start < cycles);
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// True for one thread of a whole warp: the compiler knows that there is no other.
__device__ __forceinline__ bool elected() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(chosen));
  return chosen != 0;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Copies the box at (k, row) of a row-major matrix into shared memory; out-of-range elements arrive as zeros.
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap* map, int32_t k, int32_t row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// The same as tma_load into every block of the cluster whose bit is set, at the same offsets, each signalling its own
// barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t target, const CUtensorMap* map, int32_t k, int32_t row,
                                                   uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(k), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void register_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void register_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Descriptor of a K-contiguous operand in shared memory as TMA's swizzle of 128 bytes lays it: rows of so many bytes,
// in groups of eight rows.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  constexpr uint64_t kSwizzle = uint64_t{1} << 62, kLeading = uint64_t{1} << 16,
                     kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle | kGroupStride | kLeading | ((address & 0x3FFFF) >> 4);
}

// The operand `bytes` further on in shared memory: only the lower half of a descriptor changes.
__device__ __forceinline__ uint64_t moved(uint64_t operand, uint32_t bytes) {
  return (operand & ~uint64_t{0xFFFFFFFF}) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not see that a wait completes the accumulators: this keeps their uses after it.
__device__ __forceinline__ void wgmma_settle(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Four 8 x 8 matrices of halves from a warp's fragments, two halves a register; lane l names the row l % 8 of matrix
// l / 8 in shared memory.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// A predicated store: no branch, so that what is stored is loaded well before.
__device__ __forceinline__ void store_if(void* to, uint4 v, bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(wanted))
               : "memory");
}

// d [64 x 256] (+)= a [64 x 32 bytes of K] b [256 x 32 bytes of K]^T. Register 4 j + 2 i + e of a thread: row
// 16 warp + lane / 4 + 8 i, column 8 j + 2 (lane % 4) + e. A float is a TF32 value, which TMA has rounded it to.
template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate);

#define WD_D8(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WD_D64(i) \
  WD_D8(i), WD_D8(i + 8), WD_D8(i + 16), WD_D8(i + 24), WD_D8(i + 32), WD_D8(i + 40), WD_D8(i + 48), WD_D8(i + 56)
#define WD_WGMMA(type, name, transposes)                                                                           \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma<type>(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256" name            \
                 " {"                                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 " \
                 "}, %128, %129, p, 1, 1" transposes ";\n}\n"                                                      \
                 : WD_D64(0), WD_D64(64)                                                                           \
                 : "l"(a), "l"(b), "r"(accumulate));                                                               \
  }

WD_WGMMA(__half, "k16.f32.f16.f16", ", 0, 0")
WD_WGMMA(__nv_bfloat16, "k16.f32.bf16.bf16", ", 0, 0")
WD_WGMMA(float, "k8.f32.tf32.tf32", "")
#undef WD_WGMMA
#undef WD_D64
#undef WD_D8

}  // namespace widedeep::kernels::sm90
