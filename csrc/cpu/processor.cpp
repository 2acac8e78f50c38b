// Asked of the processor itself: __builtin_cpu_supports answers no to everything where the C library that it is linked
// with has no resolver for it, as with zig's.
#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparseflow {
namespace {

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx512 = false;
};

// Intel's manual, volume 2, CPUID: leaf 1 and leaf 7; XGETBV: which registers the operating system saves.
Features ask() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = c & (1u << 12), os_saves = c & (1u << 27), avx = c & (1u << 28);
  if (!fma || !os_saves || !avx) return found;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // xmm and ymm; and the masks, the upper halves, zmm16 to zmm31
  if ((low & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = b & (1u << 5);
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kNeeded = kF | kDq | kBw | kVl;
  found.avx512 = found.avx2 && (low & kZmm) == kZmm && (b & kNeeded) == kNeeded;
  return found;
}

const Features& features() {
  static const Features found = ask();
  return found;
}

#endif

}  // namespace

#if defined(__x86_64__)
bool runs_avx2() { return features().avx2; }
bool runs_avx512() { return features().avx512; }
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
#endif

const char* best_isa() { return runs_avx512() ? "avx512" : runs_avx2() ? "avx2" : "baseline"; }

}  // namespace sparseflow
