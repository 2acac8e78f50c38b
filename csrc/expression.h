// The instructions of an elementwise expression, as programs write them and engines run them. No functions here, and nothing
// of the standard library but its integers.
//
// An expression works on places: first its inputs, then its outputs, then registers, each a number per row and sample. An
// instruction reads places a, b and c, as many as it needs, and writes place `to`, an output or a register. Row vectors, one
// number per row for all samples, are read through `b`, an index into those of the operation.
#pragma once

#include <cstdint>

namespace sparseflow {

// Numbers are shared with the writers of programs. NaN and infinities come out as torch's functions of the same name give them.
enum class Instruct : uint8_t {
  kCopy = 0,         // a
  kNumber = 1,       // number
  kRow = 2,          // vectors[b]
  kAdd = 3,          // a + b
  kSub = 4,          // a - b
  kMul = 5,          // a * b
  kDiv = 6,          // a / b
  kNeg = 7,          // -a
  kAddNumber = 8,    // a + number
  kMulNumber = 9,    // a * number
  kAbs = 10,         // |a|
  kSign = 11,        // -1, 0 or 1; 0 of NaN
  kMaximum = 12,     // the larger of a and b, NaN if either is
  kMinimum = 13,     // the smaller of a and b, NaN if either is
  kSqrt = 14,        //
  kRsqrt = 15,       // 1 / sqrt(a)
  kReciprocal = 16,  // 1 / a
  kExp = 17,         //
  kExpm1 = 18,       // exp(a) - 1
  kLog = 19,         //
  kLog1p = 20,       // log(1 + a)
  kSin = 21,         //
  kCos = 22,         //
  kTan = 23,         //
  kTanh = 24,        //
  kSigmoid = 25,     // 1 / (1 + exp(-a))
  kSoftplus = 26,    // log(1 + exp(a)), for all a
  kErf = 27,         //
  kPowNumber = 28,   // a ^ number; roots, squares, cubes and their reciprocals are made as torch makes them
  kPow = 29,         // a ^ b
  kGreater = 30,     // a > b ? 1 : 0
  kGreaterEqual = 31,  // a >= b ? 1 : 0
  kEqual = 32,       // a == b ? 1 : 0
  kWhere = 33,       // a != 0 ? b : c
  kAtan = 34,        //
  kAsin = 35,        //
  kAcos = 36,        //
  kSinh = 37,        //
  kCosh = 38,        //
  kAtan2 = 39,       // the angle of the point (b, a)
  kFloor = 40,       //
  kFma = 41,         // a * b + c
  kRowMul = 42,      // a * vectors[b]
  kRowAdd = 43,      // a + vectors[b]
  kSquare = 44,      // a * a
};
inline constexpr int kInstructs = 45;

// How many of a, b and c an instruction reads; and whether b is a row vector, and no place.
struct InstructKind {
  int reads;
  bool row_vector;
};
inline constexpr InstructKind kInstructKinds[kInstructs] = {
    {1, false}, {0, false}, {0, true},  {2, false}, {2, false}, {2, false}, {2, false}, {1, false}, {1, false},  // copy .. add_number
    {1, false}, {1, false}, {1, false}, {2, false}, {2, false}, {1, false}, {1, false}, {1, false}, {1, false},  // .. exp
    {1, false}, {1, false}, {1, false}, {1, false}, {1, false}, {1, false}, {1, false}, {1, false}, {1, false},  // .. softplus
    {1, false}, {1, false}, {2, false}, {2, false}, {2, false}, {2, false}, {3, false}, {1, false}, {1, false},  // .. asin
    {1, false}, {1, false}, {1, false}, {2, false}, {1, false}, {3, false}, {1, true},  {1, true},  {1, false},  // .. square
};

struct Instruction {
  Instruct op = Instruct::kCopy;
  uint16_t to = 0, a = 0, b = 0, c = 0;
  double number = 0;
};

}  // namespace sparseflow
