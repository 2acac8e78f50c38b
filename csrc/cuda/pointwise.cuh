// The instructions of pointwise operations (csrc/expression.h), each on one number. NaN and infinities come out as torch's.
#pragma once

#include "../expression.h"
#include "activation.cuh"
#include "device_program.h"

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

// An expression, row by row: a thread keeps to one sample, because a block has a multiple of a tile's threads. Operands are
// in the workspace (`own`, at the thread's sample), what is between them in registers of the thread's own, which are numbered
// at run time and therefore in memory. trace: what the thread's rows add to the trace.  sums: of every total.
template <class T>
SF_DEVICE void pointwise_rows(const DeviceOp& op, const char* image, T* own, int tile_log, T& trace, T* sums) {
  const DeviceInstruct* const code = reinterpret_cast<const DeviceInstruct*>(image + op.code);
  const DeviceRows* const operands = reinterpret_cast<const DeviceRows*>(image + op.operands);
  const DeviceRows* const vectors = reinterpret_cast<const DeviceRows*>(image + op.vectors);
  const uint16_t* const traces = reinterpret_cast<const uint16_t*>(vectors + op.n_vectors);
  const DeviceTotal* const totals = reinterpret_cast<const DeviceTotal*>(image + op.totals);
  T registers[kRegisters];
#pragma unroll 1
  for (int i = 0; i < op.n_totals; ++i) sums[i] = T(0);
  for (int row = threadIdx.x >> tile_log; row < op.rows; row += blockDim.x >> tile_log) {
    auto operand = [&](int place) -> T* {
      const DeviceRows rows = operands[place];
      return own + (size_t(rows.at + row * rows.step) << tile_log);
    };
    auto read = [&](int place) { return place & kRegister ? registers[place & ~kRegister] : *operand(place); };
    for (int i = 0; i < op.instructions; ++i) {
      const DeviceInstruct one = code[i];
      T a = T(0), b = T(0), c = T(0), n = T(one.number);
      if (one.reads > 0) a = read(one.a);
      if (one.reads > 1) b = read(one.b);
      if (one.reads > 2) c = read(one.c);
      if (one.row_vector) n = reinterpret_cast<const T*>(image + vectors[one.b].at)[row * vectors[one.b].step];
      const T value = instruct(Instruct(one.op), a, b, c, n);
      if (one.to & kRegister) registers[one.to & ~kRegister] = value;
      else *operand(one.to) = value;
    }
#pragma unroll 1
    for (int i = 0; i < op.traces; ++i) trace += registers[traces[i]];
#pragma unroll 1
    for (int i = 0; i < op.n_totals; ++i) sums[i] += read(totals[i].place);
  }
}

}  // namespace sparseflow::cuda
