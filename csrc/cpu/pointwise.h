// The kernel of pointwise operations: an expression's instructions, each over a strip of rows at a time, so that what it
// takes to choose one is shared by many numbers and all places stay in the first-level cache. Every sample's number is made
// by the same operations wherever it lies.
#pragma once

#include "elementary.h"
#include "kernels.h"
#include "row_kernels.h"

namespace sparseflow::SPARSEFLOW_ISA {

// What an instruction works on: `rows` of `length` vectors each. Strides are in vectors.
template <class T>
struct Strip {
  int rows, length;
  Vec<T>* to;
  const Vec<T>*a, *b, *c;
  ptrdiff_t to_stride, a_stride, b_stride, c_stride;
  const T* numbers;  // of the row vector, from the strip's first row on
  int32_t number_stride;
};

template <class T, class F>
SF_INLINE void fill(const Strip<T>& s, F f) {  // f(row)
  Vec<T>* to = s.to;
  for (int r = 0; r < s.rows; ++r, to += s.to_stride) {
    const Vec<T> x = f(r);
    for (int v = 0; v < s.length; ++v) to[v] = x;
  }
}
template <class T, class F>
SF_INLINE void map(const Strip<T>& s, F f) {
  Vec<T>* to = s.to;
  const Vec<T>* a = s.a;
  for (int r = 0; r < s.rows; ++r, to += s.to_stride, a += s.a_stride)
    for (int v = 0; v < s.length; ++v) to[v] = f(a[v]);
}
template <class T, class F>
SF_INLINE void map_row(const Strip<T>& s, F f) {  // f(a, the row's number)
  Vec<T>* to = s.to;
  const Vec<T>* a = s.a;
  const T* number = s.numbers;
  for (int r = 0; r < s.rows; ++r, to += s.to_stride, a += s.a_stride, number += s.number_stride) {
    const Vec<T> x = splat<T>(*number);
    for (int v = 0; v < s.length; ++v) to[v] = f(a[v], x);
  }
}
template <class T, class F>
SF_INLINE void map2(const Strip<T>& s, F f) {
  Vec<T>* to = s.to;
  const Vec<T>*a = s.a, *b = s.b;
  for (int r = 0; r < s.rows; ++r, to += s.to_stride, a += s.a_stride, b += s.b_stride)
    for (int v = 0; v < s.length; ++v) to[v] = f(a[v], b[v]);
}
template <class T, class F>
SF_INLINE void map3(const Strip<T>& s, F f) {
  Vec<T>* to = s.to;
  const Vec<T>*a = s.a, *b = s.b, *c = s.c;
  for (int r = 0; r < s.rows; ++r, to += s.to_stride, a += s.a_stride, b += s.b_stride, c += s.c_stride)
    for (int v = 0; v < s.length; ++v) to[v] = f(a[v], b[v], c[v]);
}

// A function of the C library, by its name.
#define SF_LIBRARY(NAME) \
  lane_by_lane<T>(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_##NAME##f(float(v))) : T(__builtin_##NAME(double(v))); })
#define SF_LIBRARY2(NAME) \
  lane_by_lane<T>(x, y, [](T v, T w) { return sizeof(T) == 4 ? T(__builtin_##NAME##f(float(v), float(w))) : T(__builtin_##NAME(double(v), double(w))); })

template <class T>
void power(const Strip<T>& s, T number) {
  using V = Vec<T>;
  if (number == T(2)) return map<T>(s, [](V x) { return x * x; });
  if (number == T(3)) return map<T>(s, [](V x) { return x * x * x; });
  if (number == T(0.5)) return map<T>(s, [](V x) { return square_root<T>(x); });
  if (number == T(-0.5)) return map<T>(s, [](V x) { return T(1) / square_root<T>(x); });
  if (number == T(-1)) return map<T>(s, [](V x) { return T(1) / x; });
  if (number == T(-2)) return map<T>(s, [](V x) { return T(1) / (x * x); });
  map<T>(s, [number](V x) {
    const V y = splat<T>(number);
    return SF_LIBRARY2(pow);
  });
}

template <class T>
void run_instruction(Instruct op, const Strip<T>& s, T number) {
  using V = Vec<T>;
  const V zero = splat<T>(0), one = splat<T>(1);
  switch (op) {
    case Instruct::kCopy: return map<T>(s, [](V x) { return x; });
    case Instruct::kNumber: return fill<T>(s, [&](int) { return splat<T>(number); });
    case Instruct::kRow: return fill<T>(s, [&](int row) { return splat<T>(s.numbers[row * s.number_stride]); });
    case Instruct::kAdd: return map2<T>(s, [](V x, V y) { return x + y; });
    case Instruct::kSub: return map2<T>(s, [](V x, V y) { return x - y; });
    case Instruct::kMul: return map2<T>(s, [](V x, V y) { return x * y; });
    case Instruct::kDiv: return map2<T>(s, [](V x, V y) { return x / y; });
    case Instruct::kNeg: return map<T>(s, [](V x) { return -x; });
    case Instruct::kAddNumber: return map<T>(s, [number](V x) { return x + number; });
    case Instruct::kMulNumber: return map<T>(s, [number](V x) { return x * number; });
    case Instruct::kAbs: return map<T>(s, [](V x) { return abs<T>(x); });
    case Instruct::kSign: return map<T>(s, [=](V x) { return x > T(0) ? one : (x < T(0) ? -one : zero); });
    case Instruct::kMaximum: return map2<T>(s, [](V x, V y) { const V larger = x > y ? x : y; return x == x ? larger : x; });
    case Instruct::kMinimum: return map2<T>(s, [](V x, V y) { const V smaller = x < y ? x : y; return x == x ? smaller : x; });
    case Instruct::kSqrt: return map<T>(s, [](V x) { return square_root<T>(x); });
    case Instruct::kRsqrt: return map<T>(s, [](V x) { return T(1) / square_root<T>(x); });
    case Instruct::kReciprocal: return map<T>(s, [](V x) { return T(1) / x; });
    case Instruct::kExp: return map<T>(s, [](V x) { return exponential<T>(x); });
    case Instruct::kExpm1: return map<T>(s, [](V x) { return exponential_minus_1<T>(x); });
    case Instruct::kLog: return map<T>(s, [](V x) { return logarithm<T>(x); });
    case Instruct::kLog1p: return map<T>(s, [](V x) { return logarithm_of_1_plus<T>(x); });
    case Instruct::kSin: return map<T>(s, [](V x) { return wave<T, false>(x); });
    case Instruct::kCos: return map<T>(s, [](V x) { return wave<T, true>(x); });
    case Instruct::kTan: return map<T>(s, [](V x) { return SF_LIBRARY(tan); });
    case Instruct::kTanh: return map<T>(s, [](V x) { return tanh(x); });
    case Instruct::kSigmoid: return map<T>(s, [](V x) { V complement; return sigmoid<T>(x, complement); });
    case Instruct::kSoftplus: return map<T>(s, [](V x) { return softplus<T>(x); });
    case Instruct::kErf: return map<T>(s, [](V x) { return error_function(x); });
    case Instruct::kPowNumber: return power<T>(s, number);
    case Instruct::kPow: return map2<T>(s, [](V x, V y) { return SF_LIBRARY2(pow); });
    case Instruct::kGreater: return map2<T>(s, [=](V x, V y) { return x > y ? one : zero; });
    case Instruct::kGreaterEqual: return map2<T>(s, [=](V x, V y) { return x >= y ? one : zero; });
    case Instruct::kEqual: return map2<T>(s, [=](V x, V y) { return x == y ? one : zero; });
    case Instruct::kWhere: return map3<T>(s, [](V x, V y, V z) { return x != T(0) ? y : z; });
    case Instruct::kAtan: return map<T>(s, [](V x) { return SF_LIBRARY(atan); });
    case Instruct::kAsin: return map<T>(s, [](V x) { return SF_LIBRARY(asin); });
    case Instruct::kAcos: return map<T>(s, [](V x) { return SF_LIBRARY(acos); });
    case Instruct::kSinh: return map<T>(s, [](V x) { return SF_LIBRARY(sinh); });
    case Instruct::kCosh: return map<T>(s, [](V x) { return SF_LIBRARY(cosh); });
    case Instruct::kAtan2: return map2<T>(s, [](V x, V y) { return SF_LIBRARY2(atan2); });
    case Instruct::kFloor: return map<T>(s, [](V x) { return floor<T>(x); });
    case Instruct::kFma: return map3<T>(s, [](V x, V y, V z) { return x * y + z; });
    case Instruct::kRowMul: return map_row<T>(s, [](V x, V y) { return x * y; });
    case Instruct::kRowAdd: return map_row<T>(s, [](V x, V y) { return x + y; });
    case Instruct::kSquare: return map<T>(s, [](V x) { return x * x; });
  }
}

#undef SF_LIBRARY
#undef SF_LIBRARY2

// Adds a strip's rows of some places to a sum over rows, in two levels as all reductions do: `part` is added to `total` after
// every kRowsPerSum rows, and at the end.
template <class T>
SF_INLINE void add_rows(const PointwiseArgs<T>& args, int first, int rows, const uint16_t* places, int n_places, Vec<T>* part, Vec<T>* total) {
  const int length = args.row_vectors;
  for (int row = first; row < first + rows; ++row) {
    for (int i = 0; i < n_places; ++i) {
      const PointwisePlace& place = args.places[places[i]];
      const Vec<T>* const x = reinterpret_cast<const Vec<T>*>(args.workspace + place.offset + first * place.advance + (row - first) * place.stride);
      for (int v = 0; v < length; ++v) part[v] += x[v];
    }
    if ((row + 1) % kRowsPerSum != 0 && row + 1 != args.rows) continue;
    for (int v = 0; v < length; ++v) total[v] += part[v], part[v] = Vec<T>{};
  }
}

inline constexpr int kMostRowVectorsOfTile = 6;  // the widest tile's (kernels.cpp)

template <class T>
void pointwise(const PointwiseArgs<T>& args) {
  const ptrdiff_t bytes = sizeof(Vec<T>);
  Vec<T> part[1 + kMostTotals][kMostRowVectorsOfTile];  // of the traces, and of every total
  for (int i = 0; i <= args.n_totals; ++i)
    for (Vec<T>& v : part[i]) v = Vec<T>{};
  auto total = [&](int i) { return reinterpret_cast<Vec<T>*>(args.workspace + args.totals[i].target); };
  for (int i = 0; i < args.n_totals; ++i)
    for (int v = 0; v < args.row_vectors; ++v) total(i)[v] = Vec<T>{};
  for (int first = 0; first < args.rows; first += args.strip) {
    const int rows = args.rows - first < args.strip ? args.rows - first : args.strip;
    for (int i = 0; i < args.n_steps; ++i) {
      const PointwiseStep<T>& step = args.steps[i];
      const InstructKind kind = kInstructKinds[static_cast<int>(step.op)];
      Strip<T> s;
      s.rows = rows;
      s.length = args.row_vectors;
      bool whole = true;  // all rows lie behind each other: they are one long row
      auto at = [&](uint16_t number, ptrdiff_t& stride) {
        const PointwisePlace& place = args.places[number];
        stride = place.stride / bytes;
        whole = whole && stride == s.length;
        return args.workspace + place.offset + first * place.advance;
      };
      s.to = reinterpret_cast<Vec<T>*>(at(step.to, s.to_stride));
      s.a = reinterpret_cast<const Vec<T>*>(at(step.a, s.a_stride));
      s.c = reinterpret_cast<const Vec<T>*>(at(step.c, s.c_stride));
      s.b = s.to, s.b_stride = s.to_stride;
      if (kind.row_vector) {
        const RowNumbers<T>& numbers = args.numbers[step.b];
        s.numbers = numbers.values + ptrdiff_t(first) * numbers.stride;
        s.number_stride = numbers.stride;
        whole = whole && numbers.stride == 0;
      } else {
        s.b = reinterpret_cast<const Vec<T>*>(at(step.b, s.b_stride));
      }
      if (whole) s.length *= s.rows, s.rows = 1;
      run_instruction<T>(step.op, s, step.number);
    }
    if (args.n_traces > 0) add_rows<T>(args, first, rows, args.traces, args.n_traces, part[0], reinterpret_cast<Vec<T>*>(args.reduce));
    for (int i = 0; i < args.n_totals; ++i) add_rows<T>(args, first, rows, &args.totals[i].place, 1, part[1 + i], total(i));
  }
}

}  // namespace sparseflow::SPARSEFLOW_ISA
