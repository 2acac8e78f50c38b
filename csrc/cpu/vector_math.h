// Elementwise activations and their slopes on one vector. Accuracy in float32 over all floats, denormals and infinities
// included: tanh within 5 ULP, sigmoid and softplus within 3 (tests/test_vector_math.py); NaN propagates everywhere.
// Polynomial coefficients are minimax fits on the reduced interval named at each function.
#pragma once

#include "../activations.h"
#include "simd.h"

namespace sparseflow::SPARSEFLOW_ISA {

template <class T, int N>
SF_INLINE Vec<T> horner(Vec<T> x, const T (&c)[N]) {  // c[0] + c[1] x + ...
  Vec<T> sum = splat<T>(c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// exp(x) = 2^n exp(r) and exp(r) = 1 + r + r^2 q, |r| <= log(2) / 2. x in about [-800, 800] (f32: [-110, 110]).
template <class T>
struct ExpParts {
  Vec<T> n, r, q;
};

SF_INLINE ExpParts<float> exp_parts(Vec<float> x) {
  const Vec<float> n = nearest<float>(x * 1.44269504088896341f);
  // log(2) in two pieces; the first has 9 trailing zero bits, so n times it is exact.
  Vec<float> r = x - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  // (exp(r) - 1 - r) / r^2 on |r| <= 0.3467
  const Vec<float> q = horner<float>(r, {0.49999999551878493f, 0.166665771895718f, 0.04166685362032535f, 0.008363162139962861f, 0.001390129392167424f});
  return {n, r, q};
}

SF_INLINE ExpParts<double> exp_parts(Vec<double> x) {
  const Vec<double> n = nearest<double>(x * 1.4426950408889634074);
  Vec<double> r = x - n * 0x1.62e42fefa0000p-1;
  r = r - n * 0x1.cf79abc9e3b3ap-40;
  const Vec<double> q = horner<double>(  // Taylor, degree 14 in all: the remainder is below 1e-18
      r, {1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
          1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0, 1.0 / 87178291200.0});
  return {n, r, q};
}

template <class T>
SF_INLINE Vec<T> whole(const ExpParts<T>& e) {
  return scale_by_power_of_two<T>((e.q * e.r + T(1)) * e.r + T(1), e.n);
}

// exp(r) - 1: nothing is lost where r is small.
template <class T>
SF_INLINE Vec<T> tail(const ExpParts<T>& e) {
  return e.r + e.r * e.r * e.q;
}

template <class T>
inline constexpr T kLargest = sizeof(T) == 4 ? T(3.40282347e38f) : T(1.7976931348623157e308);
template <class T>
inline constexpr T kExpLow = sizeof(T) == 4 ? T(-105) : T(-750);  // exp rounds to zero below

// exp(x) for x <= 0.
template <class T>
SF_INLINE Vec<T> exp_of_negative(Vec<T> x) {
  return whole<T>(exp_parts(at_least<T>(x, kExpLow<T>)));
}

// exp(x) - 1 for x <= 0, accurate near zero.
template <class T>
SF_INLINE Vec<T> expm1_of_negative(Vec<T> x) {
  const ExpParts<T> e = exp_parts(at_least<T>(x, T(-60)));
  const Vec<T> power = scale_by_power_of_two<T>(splat<T>(1), e.n);
  return power * tail<T>(e) + (power - T(1));
}

// tanh from exp(-2|x|) - 1: exact to a few roundings everywhere.
template <class T>
SF_INLINE Vec<T> tanh_by_exp(Vec<T> x) {
  const Vec<T> e = expm1_of_negative<T>(T(-2) * abs<T>(x));
  const Vec<T> magnitude = -e / (e + T(2));
  return x < T(0) ? -magnitude : (x == T(0) ? x : magnitude);
}

SF_INLINE Vec<double> tanh(Vec<double> x) { return tanh_by_exp<double>(x); }

SF_INLINE Vec<float> tanh(Vec<float> x) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  // x P(x^2) / Q(x^2) on |x| <= 9.02, where tanh rounds to 1: half the work of an exponential. The last bits of the
  // coefficients were searched for the least error after rounding, 4.6 ULP; without fused multiply-adds it would be 6.
  x = at_least<float>(at_most<float>(x, 9.02f), -9.02f);
  const Vec<float> u = x * x;
  const Vec<float> p = horner<float>(u, {1.0f, 0.133826882f, 0.00349745806f, 2.063584e-05f, 1.33845042e-08f});
  const Vec<float> q = horner<float>(u, {1.0f, 0.467160106f, 0.0258843619f, 0.000328851835f, 7.79027744e-07f});
  return at_least<float>(at_most<float>(x * p / q, 1.0f), -1.0f);
#else
  return tanh_by_exp<float>(x);
#endif
}

// sigmoid(x) and sigmoid(-x) = exp(-x) sigmoid(x) from one division. Where exp(-x) is infinite the first is zero, as is torch's.
template <class T>
SF_INLINE Vec<T> sigmoid(Vec<T> x, Vec<T>& complement) {
  const Vec<T> e = whole<T>(exp_parts(at_most<T>(at_least<T>(-x, kExpLow<T>), -kExpLow<T>)));
  const Vec<T> s = T(1) / (e + T(1));
  complement = at_most<T>(e, kLargest<T>) * s;
  return s;
}

// The same by e = exp(-|x|), which is returned for those who need it too.
template <class T>
SF_INLINE Vec<T> sigmoid_of_magnitude(Vec<T> x, Vec<T>& complement, Vec<T>& e) {
  e = exp_of_negative<T>(-abs<T>(x));
  const Vec<T> large = T(1) / (e + T(1)), small = e * large;
  complement = x < T(0) ? large : small;
  return x < T(0) ? small : large;
}

// log(1 + e) for 0 <= e <= 1
SF_INLINE Vec<float> log1p_unit(Vec<float> e) {
  // log(1 + e) / e: ten terms are cheaper than a division
  return e * horner<float>(e, {0.9999999952872f, -0.4999990242259f, 0.3332996241213f, -0.2495413361191f, 0.1967593903760f,
                               -0.1530559194908f, 0.1060365384412f, -0.0569595240939f, 0.0198514569890f, -0.0032440239917f});
}

SF_INLINE Vec<double> log1p_unit(Vec<double> e) {
  // 2 atanh(y), y = e / (2 + e) <= 1/3: (atanh(y) / y - 1) / y^2 by its Taylor series
  const Vec<double> y = e / (e + 2.0), u = y * y, twice = y + y;
  const Vec<double> series = horner<double>(u, {1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19,
                                                1.0 / 21, 1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33, 1.0 / 35});
  return twice + twice * u * series;
}

// x - n pi, for whole and half n that are small enough: n times the first pieces of pi is exact.
template <class T>
SF_INLINE Vec<T> minus_multiple_of_pi(Vec<T> x, Vec<T> n) {
  if constexpr (sizeof(T) == 4) {  // pi = 3.140625 + 9.67025756835938e-4 + 6.2771141529083e-7 + ...
    Vec<T> r = x - n * 3.140625f;
    r = r - n * 9.67025756835938e-4f;
    r = r - n * 6.2771141529083e-7f;
    return r - n * 1.2154201e-10f;
  } else {
    Vec<T> r = x - n * 0x1.921fb54400000p+1;
    r = r - n * 0x1.0b4611a600000p-33;
    return r - n * 0x1.3198a2e037073p-68;
  }
}

// (sin(r) / r - 1) / r^2 of u = r^2, |r| <= pi / 2
template <class T>
SF_INLINE Vec<T> sine_tail(Vec<T> u) {
  if constexpr (sizeof(T) == 4) {
    return horner<T>(u, {T(-0.166666659218), T(0.00833323906614), T(-0.000198224035711), T(2.63383426216e-06)});
  } else {
    return horner<T>(u, {T(-1.0 / 6), T(1.0 / 120), T(-1.0 / 5040), T(1.0 / 362880), T(-1.0 / 39916800),
                         T(1.0 / 6227020800.0), T(-1.0 / 1307674368000.0), T(1.0 / 355687428096000.0),
                         T(-1.0 / 121645100408832000.0)});
  }
}

template <class T>
inline constexpr T kReduceLimit = sizeof(T) == 4 ? T(8192) : T(1 << 20);  // beyond, n pi loses bits

// sin and cos together. Beyond `limit` the two-step reduction loses bits, and the scalar library takes over.
template <class T>
SF_INLINE void sincos(Vec<T> x, Vec<T>& sine, Vec<T>& cosine) {
  constexpr T limit = kReduceLimit<T>;
  const Vec<T> safe = abs<T>(x) <= splat<T>(limit) ? x : splat<T>(0);
  const Vec<T> n = nearest<T>(safe * T(0.31830988618379067154));
  const IVec<T> odd = as_int<T>(n + Simd<T>::kRoundMagic) << (sizeof(T) * 8 - 1);
  Vec<T> r, s, c, u;
  r = minus_multiple_of_pi<T>(safe, n);
  u = r * r;
  s = sine_tail<T>(u);
  if constexpr (sizeof(T) == 4) {
    c = horner<T>(u, {T(0.041666666055), T(-0.00138888108463), T(2.47858931874e-05), T(-2.65408074663e-07)});
  } else {
    c = horner<T>(u, {T(1.0 / 24), T(-1.0 / 720), T(1.0 / 40320), T(-1.0 / 3628800), T(1.0 / 479001600),
                      T(-1.0 / 87178291200.0), T(1.0 / 20922789888000.0), T(-1.0 / 6402373705728000.0),
                      T(1.0 / 2432902008176640000.0)});
  }
  sine = as_real<T>(as_int<T>(r + r * u * s) ^ odd);
  cosine = as_real<T>(as_int<T>(T(1) - T(0.5) * u + u * u * c) ^ odd);
  const IVec<T> reduced = abs<T>(x) <= splat<T>(limit);
  for (int i = 0; !all_lanes<T>(reduced) && i < Simd<T>::kLanes; ++i) {
    if (reduced[i]) continue;
    if constexpr (sizeof(T) == 4) sine[i] = __builtin_sinf(x[i]), cosine[i] = __builtin_cosf(x[i]);
    else sine[i] = __builtin_sin(x[i]), cosine[i] = __builtin_cos(x[i]);
  }
}

// The normal distribution at z: its density, and what lies below z.
SF_INLINE Vec<float> normal(Vec<float> z, Vec<float>& density) {
  const Vec<float> v = at_most<float>(abs<float>(z), 14.5f);  // beyond, both round to zero
  const Vec<float> bell = exp_of_negative<float>(-0.5f * v * v);
  // exp(v^2 / 2) times what lies below -v, of t = 1 / (1 + 0.35 v)
  const Vec<float> t = 1.0f / (0.35f * v + 1.0f);
  const Vec<float> tail = bell * horner<float>(t, {-1.7025137140080915e-06f, 0.13965892791748047f, 0.13951312005519867f, 0.12163054198026657f,
                                                   0.09983205050230026f, -0.01169124897569418f, 0.1444893181324005f, -0.24403341114521027f,
                                                   0.13874001801013947f, -0.028137611225247383f});
  density = 0.3989422804f * bell;
  return z < 0.0f ? tail : 1.0f - tail;
}

SF_INLINE Vec<double> normal(Vec<double> z, Vec<double>& density) {
  density = 0.39894228040143267794 * exp_of_negative<double>(-0.5 * z * z);
  Vec<double> below;
  for (int i = 0; i < Simd<double>::kLanes; ++i) below[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * z[i]);
  return below;
}

// h = act(z), slope = act'(z), curvature = act''(z); what is not used costs nothing once inlined. Where a derivative jumps
// it is what sparseflow_kernels/activations.py says.
template <class T, Activation A>
SF_INLINE void activate(Vec<T> z, T a, T b, T inverse_a, Vec<T>& h, Vec<T>& slope, Vec<T>& curvature) {
  curvature = Vec<T>{};
  if constexpr (A == Activation::kIdentity) {
    h = z;
    slope = splat<T>(1);
  } else if constexpr (A == Activation::kTanh) {
    h = tanh(z);
    slope = T(1) - h * h;
    curvature = T(-2) * h * slope;
  } else if constexpr (A == Activation::kSigmoid) {
    Vec<T> complement;
    h = sigmoid<T>(z, complement);
    slope = h * complement;
    curvature = slope * (complement - h);
  } else if constexpr (A == Activation::kSoftplus) {
    const Vec<T> x = z * a;
    Vec<T> complement, e;
    const Vec<T> linear = x > splat<T>(b) ? splat<T>(1) : splat<T>(0);
    const Vec<T> s = sigmoid_of_magnitude<T>(x, complement, e);
    const Vec<T> positive = at_least<T>(x, T(0));
    h = linear != T(0) ? z : (positive + log1p_unit(e)) * inverse_a;
    slope = linear != T(0) ? linear : s;
    curvature = linear != T(0) ? splat<T>(0) : a * (s * complement);
  } else if constexpr (A == Activation::kRelu) {
    h = at_least<T>(z, T(0));
    slope = z > T(0) ? splat<T>(1) : splat<T>(0);
  } else if constexpr (A == Activation::kElu) {
    const Vec<T> below = expm1_of_negative<T>(at_most<T>(z, T(0)));
    h = z > T(0) ? z : a * below;
    slope = z > T(0) ? splat<T>(1) : a * (below + T(1));
    curvature = z > T(0) ? splat<T>(0) : slope;
  } else if constexpr (A == Activation::kSilu) {
    Vec<T> complement;
    const Vec<T> s = sigmoid<T>(z, complement);
    h = z * s;
    slope = s + h * complement;
    curvature = s * complement * (T(2) + z * (complement - s));
  } else if constexpr (A == Activation::kSin) {
    sincos<T>(z, h, slope);
    curvature = -h;
  } else if constexpr (A == Activation::kSquare) {
    h = z * z;
    slope = z + z;
    curvature = splat<T>(2);
  } else if constexpr (A == Activation::kCube) {
    h = z * z * z;
    slope = T(3) * z * z;
    curvature = T(6) * z;
  } else if constexpr (A == Activation::kGelu) {
    Vec<T> density;
    const Vec<T> below = normal(z, density);
    const Vec<T> bounded = at_least<T>(at_most<T>(z, T(40)), T(-40));  // beyond, the density is zero
    h = z * below;
    slope = below + bounded * density;
    curvature = density * (T(2) - bounded * bounded);
  }
}

template <class T, Activation A>
SF_INLINE void activate(Vec<T> z, T a, T b, T inverse_a, Vec<T>& h, Vec<T>& slope) {
  Vec<T> curvature;
  activate<T, A>(z, a, b, inverse_a, h, slope, curvature);
}

}  // namespace sparseflow::SPARSEFLOW_ISA
