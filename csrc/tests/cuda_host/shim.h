// CUDA's language on the host: the kernel source that nvcc compiles runs here under g++, every CUDA thread a fibre, all
// of them on the thread that launches. A fibre runs until a barrier or a warp operation it has to wait at, so that a
// launch is deterministic; a seed shuffles the order, so that a missing barrier shows. What is wrong in a kernel (a
// barrier in divergent code, a lane that is named and has left, writes outside shared memory, a deadlock) is thrown by
// launch(), with blocks, threads and source lines.
//
// Not modelled: the order of memory (every write is seen at once), tensor cores, __activemask, static __shared__ (it
// does not compile: use shim::dynamic_shared), spinning without __nanosleep or an atomic (it never ends).
#pragma once

#include <math.h>  // not <cmath> alone: as in CUDA, exp(float) is to be a float
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

// --------------------------------------------------------------------------------------------------------- keywords

#define __global__
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static

// -------------------------------------------------------------------------------------------------------- the host's

using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;

// ----------------------------------------------------------------------------------------------------- vector types

#define SHIM_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {          \
    type x, y;                              \
  };                                        \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SHIM_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {          \
    type x, y, z, w;                        \
  };                                        \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

SHIM_VECTOR2(ushort2, unsigned short, 4)
SHIM_VECTOR2(int2, int, 8)
SHIM_VECTOR2(uint2, unsigned, 8)
SHIM_VECTOR2(float2, float, 8)
SHIM_VECTOR2(double2, double, 16)
SHIM_VECTOR4(ushort4, unsigned short, 8)
SHIM_VECTOR4(int4, int, 16)
SHIM_VECTOR4(uint4, unsigned, 16)
SHIM_VECTOR4(float4, float, 16)

#undef SHIM_VECTOR2
#undef SHIM_VECTOR4

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ----------------------------------------------------------------------------------------------------------- launch

#if defined(__SANITIZE_THREAD__)
#define SHIM_UNTRACED __attribute__((no_sanitize_thread))  // no part of the search for races (races.h)
#else
#define SHIM_UNTRACED
#endif

#pragma GCC visibility push(hidden)  // two extension modules that hold the shim must not share its state

// of the fibre that runs
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace shim {

struct Launch {
  std::uint64_t seed = 0;         // 0: fibres run in order; else in a pseudo-random one. SPARSEFLOW_SHIM_SEED overrides it
  bool cooperative = true;        // all blocks alive at once; else one after another
  std::size_t stack_bytes = 0;    // of a fibre; 0: 64 KiB, more under a sanitizer
  long long spin_limit = 10'000'000;  // yields of spinning fibres without any other event that count as a deadlock
};

// What a launch cost, for tests and timing.
struct Statistics {
  long long switches = 0, block_barriers = 0, warp_operations = 0, yields = 0;
};
Statistics last_launch();

// The running block's shared memory: as many bytes as were launched, aligned to 128, full of NaNs (kPoison) at first.
char* dynamic_shared();
inline constexpr std::uint32_t kPoison = 0x7ffda5a5;  // a NaN as a float, and twice as a double

// cp.async: 4, 8 or 16 bytes, aligned. The destination is poison until the waiting for its group is over. That the source
// or the destination changes in between is an error.
void async_copy(void* to, const void* from, int bytes);
void async_commit();
void async_wait(int groups_left);  // cp.async.wait_group
void async_wait_all();             // cp.async.wait_all: also what was not committed

namespace detail {

struct Where {  // in the kernel's source
  const char* file;
  int line;
};

enum class Op : unsigned char {
  kSyncThreads, kSyncThreadsOr, kSyncThreadsAnd, kSyncThreadsCount,
  kSyncWarp, kShuffle, kShuffleXor, kShuffleUp, kShuffleDown, kBallot, kAny, kAll,
};

int block_barrier(Op op, bool predicate, Where where);
// Every lane of the mask brings `value`; a shuffle gives back that of lane `source` (poison if the mask does not name
// it), a vote a mask of the lanes whose value is not zero.
std::uint64_t warp_operation(Op op, unsigned mask, std::uint64_t value, int source, Where where);
// The segment of `width` lanes that the running lane is in: its own number and the segment's first.
struct Segment {
  int lane, first;
};
Segment segment(int width);

void yield();    // of a spinning fibre: an error when nothing else happens for too long
void preempt();  // perhaps to another fibre
[[noreturn]] void trap();

extern int until_preempted;
extern long long idle_yields;

// GPU threads can be overtaken anywhere; here at atomics and fences, where it matters most.
SHIM_UNTRACED inline void may_preempt() {
  if (--until_preempted <= 0) preempt();
}

using Body = void (*)(const void*);
void launch(Body body, const void* argument, int blocks, int threads, std::size_t shared_bytes, const Launch& options);

template <class T>
struct Same {
  using type = T;
};
template <class T>
using same = typename Same<T>::type;  // takes no part in deduction

}  // namespace detail

// Runs the kernel to its end. Throws what a kernel throws, std::runtime_error for a fault of the kernel's, and
// std::invalid_argument for a launch that CUDA would refuse; the next launch works.
template <class P>
void launch(void (*kernel)(P), detail::same<P> parameters, int blocks, int threads, std::size_t shared_bytes, Launch options = {}) {
  struct Call {
    void (*kernel)(P);
    const P* parameters;
  };
  const Call call{kernel, &parameters};
  detail::launch(
      [](const void* argument) {
        const Call& c = *static_cast<const Call*>(argument);
        c.kernel(*c.parameters);
      },
      &call, blocks, threads, shared_bytes, options);
}

}  // namespace shim

// --------------------------------------------------------------------------------------------------- block barriers

// the caller's line: two parameters, since a default inside braces would be this file's
#define SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_HERE) { shim::detail::block_barrier(shim::detail::Op::kSyncThreads, false, {file, line}); }
inline int __syncthreads_or(int predicate, SHIM_HERE) {
  return shim::detail::block_barrier(shim::detail::Op::kSyncThreadsOr, predicate != 0, {file, line});
}
inline int __syncthreads_and(int predicate, SHIM_HERE) {
  return shim::detail::block_barrier(shim::detail::Op::kSyncThreadsAnd, predicate != 0, {file, line});
}
inline int __syncthreads_count(int predicate, SHIM_HERE) {
  return shim::detail::block_barrier(shim::detail::Op::kSyncThreadsCount, predicate != 0, {file, line});
}

// -------------------------------------------------------------------------------------------------- warp operations

inline void __syncwarp(unsigned mask = 0xffffffffu, SHIM_HERE) {
  shim::detail::warp_operation(shim::detail::Op::kSyncWarp, mask, 0, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_HERE) {
  return static_cast<unsigned>(shim::detail::warp_operation(shim::detail::Op::kBallot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, SHIM_HERE) {
  return shim::detail::warp_operation(shim::detail::Op::kAny, mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_HERE) {
  return shim::detail::warp_operation(shim::detail::Op::kAll, mask, predicate != 0, 0, {file, line}) == mask;
}

namespace shim::detail {

template <class T>
T shuffle(Op op, unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 32 or 64-bit numbers");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(op, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace shim::detail

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SHIM_HERE) {
  const auto s = shim::detail::segment(width);
  return shim::detail::shuffle(shim::detail::Op::kShuffle, mask, value, s.first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SHIM_HERE) {
  const auto s = shim::detail::segment(width);
  const bool inside = delta <= static_cast<unsigned>(s.lane - s.first);
  return shim::detail::shuffle(shim::detail::Op::kShuffleUp, mask, value, inside ? s.lane - static_cast<int>(delta) : s.lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SHIM_HERE) {
  const auto s = shim::detail::segment(width);
  const bool inside = delta < static_cast<unsigned>(s.first + width - s.lane);
  return shim::detail::shuffle(shim::detail::Op::kShuffleDown, mask, value, inside ? s.lane + static_cast<int>(delta) : s.lane, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SHIM_HERE) {
  const auto s = shim::detail::segment(width);
  const int source = s.lane ^ (lanes & (warpSize - 1));  // an earlier segment may be read, a later one not
  return shim::detail::shuffle(shim::detail::Op::kShuffleXor, mask, value, source < s.first + width ? source : s.lane, {file, line});
}

// ----------------------------------------------------------------------------------------------- atomics and fences

namespace shim::detail {

template <class T, class... Allowed>
inline constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

// *at = change(*at); gives back what was there
template <class T, class F>
SHIM_UNTRACED T atomically(T* at, F change) {
  may_preempt();
  const T old = *at, value = change(old);
  if (std::memcmp(&old, &value, sizeof(T)) != 0) idle_yields = 0;
  *at = value;
  return old;
}

}  // namespace shim::detail

// Only the types that CUDA has them for, so that nvcc accepts what passes here.
template <class T>
T atomicAdd(T* at, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, unsigned long long, float, double>);
  return shim::detail::atomically(at, [value](T old) {
    if constexpr (std::is_same_v<T, int>) {
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps around
    } else {
      return old + value;
    }
  });
}
template <class T>
T atomicMax(T* at, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, long long, unsigned long long>);
  return shim::detail::atomically(at, [value](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* at, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, long long, unsigned long long>);
  return shim::detail::atomically(at, [value](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T* at, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, unsigned long long>);
  return shim::detail::atomically(at, [value](T old) { return old | value; });
}
template <class T>
T atomicExch(T* at, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, unsigned long long, float>);
  return shim::detail::atomically(at, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* at, shim::detail::same<T> expected, shim::detail::same<T> value) {
  static_assert(shim::detail::one_of<T, int, unsigned, unsigned long long, unsigned short>);
  return shim::detail::atomically(at, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence_block() {
  asm volatile("" ::: "memory");
  shim::detail::may_preempt();
}
inline void __threadfence() { __threadfence_block(); }
inline void __threadfence_system() { __threadfence_block(); }
inline void __nanosleep(unsigned) { shim::detail::yield(); }
[[noreturn]] inline void __trap() { shim::detail::trap(); }
long long clock64();

// ------------------------------------------------------------------------------------------------ loads and numbers

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  asm volatile("" ::: "memory");  // read anew each time, as a spinning loop expects
  return *at;
}
template <class T>
void __stcg(T* at, shim::detail::same<T> value) {
  *at = value;
  asm volatile("" ::: "memory");
}

namespace shim::detail {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace shim::detail

inline int __float_as_int(float x) { return shim::detail::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return shim::detail::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return shim::detail::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return shim::detail::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return shim::detail::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return shim::detail::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Correctly rounded operations that no compiler may fuse; the host is built with contraction off where that matters.
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }

// The fast approximations, here exact. glibc declares names like these for itself, so they are macros.
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf powf
#ifdef __GLIBC_PREREQ
#define SHIM_HAS_RSQRT __GLIBC_PREREQ(2, 41)
#else
#define SHIM_HAS_RSQRT 0
#endif
#if !SHIM_HAS_RSQRT
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#endif

#define SHIM_MIN_MAX(type)                                         \
  inline type min(type x, type y) { return y < x ? y : x; }        \
  inline type max(type x, type y) { return x < y ? y : x; }
SHIM_MIN_MAX(int)
SHIM_MIN_MAX(unsigned)
SHIM_MIN_MAX(long)
SHIM_MIN_MAX(unsigned long)
SHIM_MIN_MAX(long long)
SHIM_MIN_MAX(unsigned long long)
#undef SHIM_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

#pragma GCC visibility pop
