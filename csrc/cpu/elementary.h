// The elementary functions of pointwise expressions on one vector, over all arguments, infinities and NaN included. Accuracy
// in float32: within 2 ULP, sin, cos, sigmoid and softplus within 3, tanh within 5; in float64 within 3, cos within 4. What is
// not here is the C library's, lane by lane (csrc/cpu/pointwise.h). Fitted coefficients are minimax, on the interval named
// beside them.
#pragma once

#include "vector_math.h"

namespace sparseflow::SPARSEFLOW_ISA {

template <class T, class F>
SF_INLINE Vec<T> lane_by_lane(Vec<T> x, F f) {
  Vec<T> out;
  for (int i = 0; i < Simd<T>::kLanes; ++i) out[i] = f(x[i]);
  return out;
}
template <class T, class F>
SF_INLINE Vec<T> lane_by_lane(Vec<T> x, Vec<T> y, F f) {
  Vec<T> out;
  for (int i = 0; i < Simd<T>::kLanes; ++i) out[i] = f(x[i], y[i]);
  return out;
}

template <class T>
SF_INLINE Vec<T> square_root(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  else return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  return lane_by_lane<T>(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_sqrtf(float(v))) : T(__builtin_sqrt(double(v))); });
#endif
}

template <class T>
SF_INLINE Vec<T> floor(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_floor_ps((__m512)x);
  else return (Vec<T>)_mm512_floor_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_floor_ps((__m256)x);
  else return (Vec<T>)_mm256_floor_pd((__m256d)x);
#else
  return lane_by_lane<T>(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_floorf(float(v))) : T(__builtin_floor(double(v))); });
#endif
}

template <class T>
inline constexpr T kInfinity = sizeof(T) == 4 ? T(__builtin_huge_valf()) : T(__builtin_huge_val());
template <class T>
inline constexpr T kExpHigh = sizeof(T) == 4 ? T(89) : T(710);  // exp is infinite from here on

template <class T>
SF_INLINE Vec<T> exponential(Vec<T> x) {
  return whole<T>(exp_parts(at_most<T>(at_least<T>(x, kExpLow<T>), kExpHigh<T>)));
}

// Of half the power, since the whole one may be infinite where the result is not.
template <class T>
SF_INLINE Vec<T> exponential_minus_1(Vec<T> x) {
  const ExpParts<T> e = exp_parts(at_most<T>(at_least<T>(x, T(-60)), kExpHigh<T>));
  const Vec<T> power = scale_by_power_of_two<T>(splat<T>(0.5), e.n);
  const Vec<T> half = power * tail<T>(e) + (power - T(0.5));
  return x == T(0) ? x : half + half;
}

// log(2^n (1 + f) + lost): f in [sqrt(1/2) - 1, sqrt(2) - 1], `lost` far below the rounding of the sum.
SF_INLINE Vec<float> log_of_parts(Vec<float> n, Vec<float> f, Vec<float> lost) {
  // (log(1 + f) - f + f^2 / 2) / f^3
  const Vec<float> tail = horner<float>(f, {0.3333333134651184f, -0.25000837445259094f, 0.2000129222869873f, -0.16622763872146606f,
                                            0.14199699461460114f, -0.13164198398590088f, 0.1277908831834793f, -0.07646037638187408f});
  const Vec<float> square = f * f;
  // log(2) in two pieces; n times the first one is exact
  return n * 0.693145751953125f + (f + (f * square * tail - 0.5f * square + (n * 1.42860677e-6f + lost)));
}

SF_INLINE Vec<double> log_of_parts(Vec<double> n, Vec<double> f, Vec<double> lost) {
  // log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + r), s = f / (2 + f), r = 2 (atanh(s) / s - 1) by its Taylor series: |s| < 0.172
  const Vec<double> s = f / (f + 2.0), u = s * s, half_square = 0.5 * f * f;
  const Vec<double> r = u * horner<double>(u, {2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21, 2.0 / 23});
  return n * 0x1.62e42fefa0000p-1 - ((half_square - (s * (half_square + r) + (n * 0x1.cf79abc9e3b3ap-40 + lost))) - f);
}

// log(x + lost) for x > 0, a normal number or not; nonsense elsewhere.
template <class T>
SF_INLINE Vec<T> log_of_positive(Vec<T> x, Vec<T> lost) {
  constexpr T kSmallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022), kUp = sizeof(T) == 4 ? T(0x1p24) : T(0x1p54), kShift = sizeof(T) == 4 ? T(24) : T(54);
  const Vec<T> denormal = x < kSmallest ? splat<T>(1) : splat<T>(0);
  const Vec<T> normal = denormal != T(0) ? x * kUp : x;
  // m in [sqrt(1/2), sqrt(2)): what exceeds the bits of sqrt(1/2) goes to the exponent
  const IVec<T> low = as_int<T>(splat<T>(T(0.70710678118654752440)));
  const IVec<T> bits = as_int<T>(normal) - low, exponent = bits >> Simd<T>::kMantissa;
  const Vec<T> m = as_real<T>(as_int<T>(normal) - (exponent << Simd<T>::kMantissa));
  const Vec<T> n = as_real<T>(exponent + as_int<T>(splat<T>(Simd<T>::kRoundMagic))) - Simd<T>::kRoundMagic;
  return log_of_parts(n - denormal * kShift, m - T(1), lost);
}

template <class T>
SF_INLINE Vec<T> logarithm_of(Vec<T> x, Vec<T> lost) {
  Vec<T> out = log_of_positive<T>(x, lost);
  out = x < kInfinity<T> ? out : x;  // infinity, NaN
  out = x == T(0) ? splat<T>(-kInfinity<T>) : out;
  return x < T(0) ? splat<T>(T(__builtin_nan(""))) : out;
}
template <class T>
SF_INLINE Vec<T> logarithm(Vec<T> x) {
  return logarithm_of<T>(x, Vec<T>{});
}

// What 1 + x loses to rounding is added again.
template <class T>
SF_INLINE Vec<T> logarithm_of_1_plus(Vec<T> x) {
  Vec<T> sum = x + T(1);
  keep_in_register(sum);  // as it was rounded
  const Vec<T> lost = (x < T(1) ? x - (sum - T(1)) : T(1) - (sum - x)) / sum;
  const Vec<T> out = logarithm_of<T>(sum, sum > T(0) && sum < kInfinity<T> ? lost : splat<T>(0));
  return x == T(0) ? x : out;
}

// log(1 + exp(x))
template <class T>
SF_INLINE Vec<T> softplus(Vec<T> x) {
  return at_least<T>(x, T(0)) + log1p_unit(exp_of_negative<T>(-abs<T>(x)));
}

// sin(x), or cos(x) = -sin(x - (k + 1/2) pi) (-1)^k, of whose reduced argument nothing is lost where they are small.
template <class T, bool Cosine>
SF_INLINE Vec<T> wave(Vec<T> x) {
  constexpr T limit = kReduceLimit<T>;
  constexpr T half = Cosine ? T(0.5) : T(0);
  const Vec<T> safe = abs<T>(x) <= splat<T>(limit) ? x : splat<T>(0);
  const Vec<T> k = nearest<T>(safe * T(0.31830988618379067154) - half);
  const IVec<T> odd = as_int<T>(k + (Simd<T>::kRoundMagic + (Cosine ? T(1) : T(0)))) << (sizeof(T) * 8 - 1);
  const Vec<T> r = minus_multiple_of_pi<T>(safe, k + half), u = r * r;
  Vec<T> out = as_real<T>(as_int<T>(r + r * u * sine_tail<T>(u)) ^ odd);
  const IVec<T> reduced = abs<T>(x) <= splat<T>(limit);
  for (int i = 0; !all_lanes<T>(reduced) && i < Simd<T>::kLanes; ++i) {
    if (reduced[i]) continue;
    if constexpr (sizeof(T) == 4) out[i] = Cosine ? __builtin_cosf(x[i]) : __builtin_sinf(x[i]);
    else out[i] = Cosine ? __builtin_cos(x[i]) : __builtin_sin(x[i]);
  }
  return Cosine ? out : (x == T(0) ? x : out);
}

SF_INLINE Vec<float> error_function(Vec<float> x) {
  const Vec<float> t = abs<float>(x), u = x * x;
  // (erf(x) / x - 1) of x^2, |x| <= 1
  const Vec<float> inner = horner<float>(u, {0.12837916612625122f, -0.3761262595653534f, 0.1128358542919159f, -0.026853810995817184f,
                                             0.005188327748328447f, -0.0008010192541405559f, 7.853857823647559e-05f});
  // log(1 - erf(t)), 1 <= t <= 3.95, where it rounds to 1
  const Vec<float> outer = horner<float>(at_most<float>(t, 3.95f), {-0.00034151296131312847f, -1.127089262008667f, -0.6381447315216064f,
                                             -0.10310681909322739f, 0.021838095039129257f, -0.002947666449472308f, 0.00018638005713000894f});
  const Vec<float> magnitude = 1.0f - exp_of_negative<float>(outer);
  return t <= 1.0f ? x + x * inner : (x < 0.0f ? -magnitude : magnitude);
}

SF_INLINE Vec<double> error_function(Vec<double> x) {
  return lane_by_lane<double>(x, [](double v) { return __builtin_erf(v); });
}

}  // namespace sparseflow::SPARSEFLOW_ISA
