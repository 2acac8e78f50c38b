// The activations of one number: value, slope and curvature (csrc/cpu/vector_math.h says the same in vectors). Where a
// derivative jumps it is what sparseflow_kernels/activations.py says.
#pragma once

#include "../activations.h"
#include "platform.h"

namespace sparseflow::cuda {

template <class T>
struct Activated {
  T h, slope, curvature;
};

// sigmoid(x) and sigmoid(-x) without cancellation; e = exp(-|x|)
template <class T>
SF_DEVICE T sigmoid(T x, T& complement, T& e) {
  e = exp(-fabs(x));
  const T large = T(1) / (T(1) + e), small = e * large;
  complement = x < T(0) ? large : small;
  return x < T(0) ? small : large;
}

template <class T>
SF_DEVICE T sigmoid(T x) {
  T complement, e;
  return sigmoid(x, complement, e);
}

// sin and cos of large arguments take a long way; one copy of it is enough
template <class T>
SF_CALLED Activated<T> sine(T z) {
  const T h = sin(z);
  return {h, cos(z), -h};
}

template <Activation Which, class T>
SF_DEVICE Activated<T> activate_one(T z, T a, T b) {
  if constexpr (Which == Activation::kTanh) {
    const T h = tanh(z), slope = T(1) - h * h;
    return {h, slope, T(-2) * h * slope};
  } else if constexpr (Which == Activation::kSigmoid) {
    T complement, e;
    const T h = sigmoid(z, complement, e), slope = h * complement;
    return {h, slope, slope * (complement - h)};
  } else if constexpr (Which == Activation::kSoftplus) {
    const T x = z * a;
    T complement, e;
    const T s = sigmoid(x, complement, e);
    if (x > b) return {z, T(1), T(0)};
    return {((x < T(0) ? T(0) : x) + log1p(e)) / a, s, a * (s * complement)};
  } else if constexpr (Which == Activation::kRelu) {
    return {z < T(0) ? T(0) : z, z > T(0) ? T(1) : T(0), T(0)};
  } else if constexpr (Which == Activation::kElu) {
    const T below = expm1(z > T(0) ? T(0) : z);
    if (z > T(0)) return {z, T(1), T(0)};
    const T slope = a * (below + T(1));
    return {a * below, slope, slope};
  } else if constexpr (Which == Activation::kSilu) {
    T complement, e;
    const T s = sigmoid(z, complement, e), h = z * s;
    return {h, s + h * complement, s * complement * (T(2) + z * (complement - s))};
  } else if constexpr (Which == Activation::kSin) {
    return sine(z);
  } else if constexpr (Which == Activation::kSquare) {
    return {z * z, z + z, T(2)};
  } else if constexpr (Which == Activation::kCube) {
    return {z * z * z, T(3) * z * z, T(6) * z};
  } else if constexpr (Which == Activation::kGelu) {
    const T bounded = z > T(40) ? T(40) : z < T(-40) ? T(-40) : z;  // beyond, the density is zero
    const T below = T(0.5) * erfc(T(-0.70710678118654752440) * z), density = T(0.39894228040143267794) * exp(T(-0.5) * bounded * bounded);
    return {z * below, below + bounded * density, density * (T(2) - bounded * bounded)};
  } else {
    return {z, T(1), T(0)};
  }
}

template <class T>
SF_DEVICE Activated<T> activate(Activation which, T z, T a, T b) {
  switch (which) {
#define SF_CASE(A)     \
  case Activation::A:  \
    return activate_one<Activation::A>(z, a, b);
    SF_CASE(kTanh)
    SF_CASE(kSigmoid)
    SF_CASE(kSoftplus)
    SF_CASE(kRelu)
    SF_CASE(kElu)
    SF_CASE(kSilu)
    SF_CASE(kSin)
    SF_CASE(kSquare)
    SF_CASE(kCube)
    SF_CASE(kGelu)
#undef SF_CASE
    default:
      return activate_one<Activation::kIdentity>(z, a, b);
  }
}

}  // namespace sparseflow::cuda
