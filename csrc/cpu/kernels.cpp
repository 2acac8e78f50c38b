// Compiled once per instruction set (SPARSEFLOW_ISA names the namespace). Only kernels live here: nothing from the C++
// library, whose inline functions the linker could merge across instruction sets.
#include "kernels.h"

#include "adjoint_kernels.h"
#include "pointwise.h"
#include "row_kernels.h"

namespace sparseflow::SPARSEFLOW_ISA {

template <class T>
void combine(const T* y, const T* const* k, const T* c, int terms, int n, T* out) {
  constexpr int L = Simd<T>::kLanes;
  for (int i = 0; i < n; i += L) {
    Vec<T> sum = Vec<T>{};
    for (int j = 0; j < terms; ++j) sum += c[j] * *reinterpret_cast<const Vec<T>*>(k[j] + i);
    *reinterpret_cast<Vec<T>*>(out + i) = *reinterpret_cast<const Vec<T>*>(y + i) + sum;
  }
}

template <class T>
void error_row(const T* y0, const T* y1, const T* const* k, const T* c, int terms, T rtol, T atol, int n, double* sums) {
  constexpr int L = Simd<T>::kLanes;
  for (int i = 0; i < n; i += L) {
    Vec<T> error = Vec<T>{};
    for (int j = 0; j < terms; ++j) error += c[j] * *reinterpret_cast<const Vec<T>*>(k[j] + i);
    const Vec<T> before = abs<T>(*reinterpret_cast<const Vec<T>*>(y0 + i));
    const Vec<T> after = abs<T>(*reinterpret_cast<const Vec<T>*>(y1 + i));
    const Vec<T> larger = before > after ? before : after;
    // a NaN state must not look like a small error: the sum carries it into the ratio
    const Vec<T> ratio = error / (atol + rtol * larger) + (before - before) + (after - after);
    for (int lane = 0; lane < L; ++lane) sums[i + lane] += double(ratio[lane]) * double(ratio[lane]);
  }
}

template <class T>
void interpolate(const T* y0, const T* y1, const T* mid, const T* f0, const T* f1, T dt, T x, int n, T* out) {
  constexpr int L = Simd<T>::kLanes;
  for (int i = 0; i < n; i += L) {
    auto at = [i](const T* p) { return *reinterpret_cast<const Vec<T>*>(p + i); };
    const Vec<T> a = T(2) * dt * (at(f1) - at(f0)) - T(8) * (at(y1) + at(y0)) + T(16) * at(mid);
    const Vec<T> b = dt * (T(5) * at(f0) - T(3) * at(f1)) + T(18) * at(y0) + T(14) * at(y1) - T(32) * at(mid);
    const Vec<T> c = dt * (at(f1) - T(4) * at(f0)) - T(11) * at(y0) - T(5) * at(y1) + T(16) * at(mid);
    const Vec<T> d = dt * at(f0);
    *reinterpret_cast<Vec<T>*>(out + i) = at(y0) + x * (d + x * (c + x * (b + x * a)));
  }
}

// Plain arrays of any length and alignment: the last vector is filled from what is there.
template <class T, class F>
SF_INLINE void elementwise(int n, F body) {
  constexpr int L = Simd<T>::kLanes;
  for (int i = 0; i < n; i += L) body(i, n - i < L ? n - i : L);
}
template <class T>
SF_INLINE Vec<T> load(const T* x, int lanes) {
  Vec<T> v = Vec<T>{};
  if (lanes == Simd<T>::kLanes) __builtin_memcpy(&v, x, sizeof v);
  else
    for (int j = 0; j < lanes; ++j) v[j] = x[j];
  return v;
}
template <class T>
SF_INLINE void store(Vec<T> v, T* x, int lanes) {
  if (lanes == Simd<T>::kLanes) __builtin_memcpy(x, &v, sizeof v);
  else
    for (int j = 0; j < lanes; ++j) x[j] = v[j];
}

template <class T>
void sigmoid_of_time(const T* slope, const T* offset, T t, int n, T* out) {
  elementwise<T>(n, [&](int i, int lanes) {
    Vec<T> complement;
    store<T>(sigmoid<T>(load<T>(slope + i, lanes) * t + load<T>(offset + i, lanes), complement), out + i, lanes);
  });
}

template <class T>
void scale(const T* x, T factor, int n, T* out) {
  for (int i = 0; i < n; ++i) out[i] = factor * x[i];
}

template <class T, Activation A>
void activation_of(T a, T b, const T* z, int n, T* h, T* slope, T* curvature) {
  elementwise<T>(n, [&](int i, int lanes) {
    Vec<T> value, first, second;
    activate<T, A>(load<T>(z + i, lanes), a, b, T(1) / a, value, first, second);
    store<T>(value, h + i, lanes);
    store<T>(first, slope + i, lanes);
    if (curvature) store<T>(second, curvature + i, lanes);
  });
}

#define SF_FOR_EACH_ACTIVATION(X) \
  X(kIdentity) X(kTanh) X(kSigmoid) X(kSoftplus) X(kRelu) X(kElu) X(kSilu) X(kSin) X(kSquare) X(kCube) X(kGelu)

template <class T>
void activation(int which, T a, T b, const T* z, int n, T* h, T* slope, T* curvature) {
  switch (static_cast<Activation>(which)) {
#define X(NAME)                \
  case Activation::NAME:       \
    return activation_of<T, Activation::NAME>(a, b, z, n, h, slope, curvature);
    SF_FOR_EACH_ACTIVATION(X)
#undef X
  }
}

template <class T, int NV>
constexpr void offer_width(Kernels<T>& table, int index) {
  table.vectors[index] = NV;
  table.rows_in_flight[index] = rows_in_flight(NV);
  table.rows_in_flight_tangent[index] = rows_in_flight(2 * NV);
  table.dense_rows[index] = dense_rows(NV);
  table.dense_rows_tangent[index] = dense_rows(2 * NV);
#define X(NAME)                                                                                               \
  table.affine[0][static_cast<int>(Activation::NAME)][index] = affine<T, NV, Activation::NAME, false>;        \
  table.affine[1][static_cast<int>(Activation::NAME)][index] = affine<T, NV, Activation::NAME, true>;         \
  table.affine_tangent[0][static_cast<int>(Activation::NAME)][index] = affine_tangent<T, NV, Activation::NAME, false>; \
  table.affine_tangent[1][static_cast<int>(Activation::NAME)][index] = affine_tangent<T, NV, Activation::NAME, true>;
  SF_FOR_EACH_ACTIVATION(X)
#undef X
  table.product[0][index] = product<T, NV, false>;
  table.product[1][index] = product<T, NV, true>;
  table.reduction[index] = reduction<T, NV>;
}

// Adjoints are offered three widths: which one is taken follows from the program alone, because the order of their sums
// over samples depends on it.
template <class T, int NV>
constexpr void offer_adjoint(Kernels<T>& table, int index) {
#define X(NAME)                                                                                              \
  table.keep[0][static_cast<int>(Activation::NAME)][index] = keep<T, NV, Activation::NAME, false>; \
  table.keep[1][static_cast<int>(Activation::NAME)][index] = keep<T, NV, Activation::NAME, true>;
  SF_FOR_EACH_ACTIVATION(X)
#undef X
#define X(FROM)                                                                                  \
  table.pull[static_cast<int>(SlopeFrom::FROM)][0][index] = pull<T, NV, SlopeFrom::FROM, false>; \
  table.pull[static_cast<int>(SlopeFrom::FROM)][1][index] = pull<T, NV, SlopeFrom::FROM, true>;
  X(kKept) X(kIdentity) X(kTanh) X(kSigmoid)
#undef X
  table.gradient[0][index] = gradient<T, NV>;
  table.gradient[1][index] = gradient<T, 2 * NV>;
  table.plane_gradient[0][index] = plane_gradient<T, NV>;
  table.plane_gradient[1][index] = plane_gradient<T, 2 * NV>;
}

template <class T>
constexpr Kernels<T> make_table() {
  Kernels<T> table{};
  table.lanes = Simd<T>::kLanes;
  offer_width<T, 1>(table, 0);
  offer_width<T, 2>(table, 1);
  offer_width<T, 3>(table, 2);
  offer_width<T, 4>(table, 3);
  offer_width<T, 6>(table, 4);
  offer_adjoint<T, 1>(table, 0);
  offer_adjoint<T, 2>(table, 1);
  offer_adjoint<T, 4>(table, 3);
  table.pointwise = pointwise<T>;
  table.combine = combine<T>;
  table.error_row = error_row<T>;
  table.interpolate = interpolate<T>;
  table.sigmoid = sigmoid_of_time<T>;
  table.scale = scale<T>;
  table.activation = activation<T>;
  return table;
}

extern const Kernels<float> kKernelsF32;
extern const Kernels<double> kKernelsF64;
constexpr Kernels<float> kTableF32 = make_table<float>();
constexpr Kernels<double> kTableF64 = make_table<double>();
const Kernels<float> kKernelsF32 = kTableF32;
const Kernels<double> kKernelsF64 = kTableF64;

// Ten independent chains, started from different values so that none can be computed from another.
double fma_rate_sample(long iterations, float* sink) {
  using V = Vec<float>;
  V a0 = splat<float>(*sink), a1 = a0 + 1.0f, a2 = a0 + 2.0f, a3 = a0 + 3.0f, a4 = a0 + 4.0f, a5 = a0 + 5.0f, a6 = a0 + 6.0f,
    a7 = a0 + 7.0f, a8 = a0 + 8.0f, a9 = a0 + 9.0f;
  const V b = splat<float>(0.9999f), c = splat<float>(0.5f);
  for (long i = 0; i < iterations; ++i) {
    a0 = a0 * b + c, a1 = a1 * b + c, a2 = a2 * b + c, a3 = a3 * b + c, a4 = a4 * b + c;
    a5 = a5 * b + c, a6 = a6 * b + c, a7 = a7 * b + c, a8 = a8 * b + c, a9 = a9 * b + c;
  }
  *sink = (((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)) + (a8 + a9))[0];
  return 10.0 * Simd<float>::kLanes * double(iterations);
}

}  // namespace sparseflow::SPARSEFLOW_ISA
