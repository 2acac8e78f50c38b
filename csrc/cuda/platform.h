// CUDA, or its language on the host (csrc/tests/cuda_host), and the few things that are spelled differently there.
#pragma once

#include <math.h>
#include <cstddef>
#include <cstdint>

#if defined(SPARSEFLOW_HOST_SHIM)

#include "../tests/cuda_host/shim.h"

#define SF_DEVICE inline
#define SF_CALLED __attribute__((noinline))

namespace sparseflow::cuda {

inline char* shared_memory() { return shim::dynamic_shared(); }
inline void copy_async(void* shared, const void* global) { shim::async_copy(shared, global, 16); }
inline void commit_copies() { shim::async_commit(); }
inline void wait_for_copies() { shim::async_wait_all(); }
inline void spin() { __nanosleep(20); }
inline void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { __syncthreads(file, line); }
inline void arrive(unsigned long long* counter) {
  __threadfence();
  atomicAdd(counter, 1ull);
}
inline unsigned long long look(const unsigned long long* counter) { return *const_cast<const volatile unsigned long long*>(counter); }
inline void acquire() { __threadfence(); }

}  // namespace sparseflow::cuda

#else

#include <cuda_runtime.h>

#define SF_DEVICE __device__ __forceinline__
#define SF_CALLED __device__ __noinline__  // one copy for all callers

namespace sparseflow::cuda {

extern __shared__ __align__(128) char sparseflow_shared[];
SF_DEVICE char* shared_memory() { return sparseflow_shared; }

// 16 bytes, around the first-level cache and the registers
SF_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
}
SF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
SF_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }
SF_DEVICE void spin() {}
SF_DEVICE void sync() { __syncthreads(); }
// What this thread wrote before is seen by whoever sees the count, and acquires.
SF_DEVICE void arrive(unsigned long long* counter) { asm volatile("red.release.gpu.global.add.u64 [%0], 1;\n" ::"l"(counter) : "memory"); }
SF_DEVICE unsigned long long look(const unsigned long long* counter) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(counter));
  return value;
}
SF_DEVICE void acquire() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

}  // namespace sparseflow::cuda

#endif
