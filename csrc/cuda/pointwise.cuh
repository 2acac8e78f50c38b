// The instructions of pointwise operations (csrc/expression.h), each on one number. NaN and infinities come out as torch's.
#pragma once

#include "../expression.h"
#include "activation.cuh"

namespace sparseflow::cuda {

template <class T>
SF_DEVICE T power_of(T x, T number) {
  if (number == T(2)) return x * x;
  if (number == T(3)) return x * x * x;
  if (number == T(0.5)) return sqrt(x);
  if (number == T(-0.5)) return T(1) / sqrt(x);
  if (number == T(-1)) return T(1) / x;
  if (number == T(-2)) return T(1) / (x * x);
  return pow(x, number);
}

// One copy for all: the functions are long, and every thread of a block is at the same instruction. n: the number of the
// instruction, or of its row vector.
template <class T>
SF_CALLED T instruct(Instruct op, T a, T b, T c, T n) {
  switch (op) {
    case Instruct::kCopy: return a;
    case Instruct::kNumber: return n;
    case Instruct::kRow: return n;
    case Instruct::kAdd: return a + b;
    case Instruct::kSub: return a - b;
    case Instruct::kMul: return a * b;
    case Instruct::kDiv: return a / b;
    case Instruct::kNeg: return -a;
    case Instruct::kAddNumber: return a + n;
    case Instruct::kMulNumber: return a * n;
    case Instruct::kAbs: return fabs(a);
    case Instruct::kSign: return a > T(0) ? T(1) : a < T(0) ? T(-1) : T(0);
    case Instruct::kMaximum: return a == a ? (a > b ? a : b) : a;
    case Instruct::kMinimum: return a == a ? (a < b ? a : b) : a;
    case Instruct::kSqrt: return sqrt(a);
    case Instruct::kRsqrt: return T(1) / sqrt(a);
    case Instruct::kReciprocal: return T(1) / a;
    case Instruct::kExp: return exp(a);
    case Instruct::kExpm1: return expm1(a);
    case Instruct::kLog: return log(a);
    case Instruct::kLog1p: return log1p(a);
    case Instruct::kSin: return sin(a);
    case Instruct::kCos: return cos(a);
    case Instruct::kTan: return tan(a);
    case Instruct::kTanh: return tanh(a);
    case Instruct::kSigmoid: return sigmoid(a);
    case Instruct::kSoftplus: return (a < T(0) ? T(0) : a) + log1p(exp(-fabs(a)));
    case Instruct::kErf: return erf(a);
    case Instruct::kPowNumber: return power_of(a, n);
    case Instruct::kPow: return pow(a, b);
    case Instruct::kGreater: return a > b ? T(1) : T(0);
    case Instruct::kGreaterEqual: return a >= b ? T(1) : T(0);
    case Instruct::kEqual: return a == b ? T(1) : T(0);
    case Instruct::kWhere: return a != T(0) ? b : c;
    case Instruct::kAtan: return atan(a);
    case Instruct::kAsin: return asin(a);
    case Instruct::kAcos: return acos(a);
    case Instruct::kSinh: return sinh(a);
    case Instruct::kCosh: return cosh(a);
    case Instruct::kAtan2: return atan2(a, b);
    case Instruct::kFloor: return floor(a);
    case Instruct::kFma: return a * b + c;
    case Instruct::kRowMul: return a * n;
    case Instruct::kRowAdd: return a + n;
    case Instruct::kSquare: return a * a;
  }
  return a;
}

}  // namespace sparseflow::cuda
