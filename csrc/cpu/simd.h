// One vector register of the instruction set this file is compiled for, written with the compiler's vector extension
// so that SSE2, AVX2+FMA, AVX-512 and NEON come from the same source. Everything lives in a namespace named after the
// instruction set: two builds of one inline function must never be merged by the linker.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef SPARSEFLOW_ISA
#define SPARSEFLOW_ISA baseline
#endif

#define SF_INLINE inline __attribute__((always_inline))

namespace sparseflow::SPARSEFLOW_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 4;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRoundMagic = 6755399441055744.0;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;

template <class T>
SF_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // nothing to compute; x + 0 is, since it is not x where x = -0
}
// Keeps x in a register: the compiler likes to read memory again for every use instead, and loads are what is scarce.
template <class V>
SF_INLINE void keep_in_register([[maybe_unused]] V& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}
template <class T>
SF_INLINE IVec<T> as_int(Vec<T> x) {
  return (IVec<T>)x;
}
template <class T>
SF_INLINE Vec<T> as_real(IVec<T> x) {
  return (Vec<T>)x;
}
template <class T>
SF_INLINE Vec<T> abs(Vec<T> x) {
  constexpr auto sign = decltype(IVec<T>{}[0] + 0)(1) << (sizeof(T) * 8 - 1);
  return as_real<T>(as_int<T>(x) & ~(IVec<T>{} + sign));
}
// Whether a comparison holds in every lane.
template <class T>
SF_INLINE bool all_lanes(IVec<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
  else return _mm512_movepi64_mask((__m512i)mask) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) == -1;
#else
  IVec<T> all = mask;
  for (int i = 1; i < Simd<T>::kLanes; ++i) all[0] &= mask[i];
  return all[0] != 0;
#endif
}

// max(low, x) and min(high, x), x where it is NaN: the order of the operands makes the machine's instructions do just that.
template <class T>
SF_INLINE Vec<T> at_least(Vec<T> x, T low) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)splat<T>(low), (__m512)x);
  else return (Vec<T>)_mm512_max_pd((__m512d)splat<T>(low), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)splat<T>(low), (__m256)x);
  else return (Vec<T>)_mm256_max_pd((__m256d)splat<T>(low), (__m256d)x);
#else
  return x < splat<T>(low) ? splat<T>(low) : x;
#endif
}
template <class T>
SF_INLINE Vec<T> at_most(Vec<T> x, T high) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)splat<T>(high), (__m512)x);
  else return (Vec<T>)_mm512_min_pd((__m512d)splat<T>(high), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)splat<T>(high), (__m256)x);
  else return (Vec<T>)_mm256_min_pd((__m256d)splat<T>(high), (__m256d)x);
#else
  return x > splat<T>(high) ? splat<T>(high) : x;
#endif
}

// Nearest integer, for |x| < 2^22 (2^51).
template <class T>
SF_INLINE Vec<T> nearest(Vec<T> x) {
  return (x + Simd<T>::kRoundMagic) - Simd<T>::kRoundMagic;
}

// p * 2^n for integral n, right down to zero through the denormals. Two factors, each a normal number, so that only
// the last product rounds.
template <class T>
SF_INLINE Vec<T> scale_by_power_of_two(Vec<T> p, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
  else return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  const IVec<T> bits = as_int<T>(n + Simd<T>::kRoundMagic) - as_int<T>(splat<T>(Simd<T>::kRoundMagic));
  const IVec<T> half = bits >> 1;
  const Vec<T> first = as_real<T>((half + Simd<T>::kBias) << Simd<T>::kMantissa);
  const Vec<T> second = as_real<T>((bits - half + Simd<T>::kBias) << Simd<T>::kMantissa);
  return p * first * second;
#endif
}

}  // namespace sparseflow::SPARSEFLOW_ISA
