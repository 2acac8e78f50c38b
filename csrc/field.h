// A vector field as a native engine receives it: matrices, time modulations, buffers, and a short list of operations
// over them. sparseflow_kernels/engines/program.py and adjoint.py write such programs; this header says what they mean.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "activations.h"
#include "expression.h"
#include "operations.h"

namespace sparseflow {

// A convolution: which pixels of the source a tap reads. Rows are the target's [channels][height][width], columns the
// source's. The target's pixel (y, x) reads the source's (y stride + i dilation - padding, likewise for x) through the tap
// (i, j), and zero where that is outside. Pairs are (height, width).
struct Window {
  int source[2] = {0, 0}, target[2] = {0, 0}, kernel[2] = {0, 0}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  bool present() const { return kernel[0] > 0; }
  int taps() const { return kernel[0] * kernel[1]; }
  int source_area() const { return source[0] * source[1]; }
  int target_area() const { return target[0] * target[1]; }
};

// CSR; of a convolution over the target's channels, whose columns are (source channel, tap). Where `gated`, the values depend on time through the output gate g of one modulation:
// values[path_entry[p]] += path_constant[p] * g[path_gate[p]]. Where `external`, they come from the refresh callback.
template <class T>
struct Matrix {
  int rows = 0, cols = 0;
  std::vector<int32_t> row_ptr, col;
  std::vector<T> values;
  bool gated = false;
  int gate_modulation = -1;
  std::vector<int32_t> path_entry, path_gate;
  std::vector<T> path_constant;
  int external = -1;
  int sum = -1;  // adjoint programs: where the gradient of the values is summed up
  Window window;

  bool dynamic() const { return gated || external >= 0; }
  int pattern_rows() const { return static_cast<int>(row_ptr.size()) - 1; }
  int nnz() const { return static_cast<int>(col.size()); }
};

// z = s(t) (W h + b) + c(t), kept as scale = s and shift = s b + c.
template <class T>
struct Modulation {
  int n = 0;
  std::vector<T> bias;
  std::vector<T> gate_slope, gate_offset;    // s = sigmoid(slope t + offset), or empty: 1
  std::vector<T> shift_slope, shift_offset;  // c = slope t + offset, or empty: 0
  int external_gate = -1, external_shift = -1;  // index into the refresh callback's answers
  // Or scale and shift are row vectors (Program::vectors), 1 and 0 where there is none; then there is nothing of the above.
  int scale_vector = -1, shift_vector = -1;
  // adjoint programs, with r = W h, u the cotangent of r and d the scaled slope: sum of u, and of u r + (cotangent of d) d
  int shift_sum = -1, gate_sum = -1;

  bool of_vectors() const { return scale_vector >= 0 || shift_vector >= 0; }
  bool dynamic() const { return !gate_slope.empty() || !shift_slope.empty() || external_gate >= 0 || external_shift >= 0; }
};

// A number per row, the same for all samples. A timed one is rows of the time answer of its evaluation, and has no values.
template <class T>
struct RowVector {
  int n = 0;
  std::vector<T> values;
  int time_row = -1;
  int sum = -1;  // adjoint programs: where its gradient is summed up
  bool timed() const { return time_row >= 0; }
};

struct Buffer {
  int rows = 0;
  int slots = 1;
};

struct Operand {
  int buffer = -1;  // -1: absent
  int slot = 0;
  int row = 0;  // the first one: an operand may be some rows of a buffer
  bool same(const Operand& o) const { return buffer == o.buffer && slot == o.slot && row == o.row; }
};

// An elementwise function of rows (csrc/expression.h).
struct Expression {
  std::vector<Instruction> code;
  int inputs = 0, vectors = 0, outputs = 0, registers = 0;
  int places() const { return inputs + outputs + registers; }
};

struct Op {
  OpKind kind = OpKind::kAffine;
  int matrix = -1;
  bool transposed = false;  // the matrix is W'
  Operand source, target;
  // affine, keep
  int modulation = -1;
  Activation activation = Activation::kIdentity;
  ActivationParams params;
  int store = 0;  // sparseflow::Store
  Operand seed, weight;
  // product (factor), reduction (factor, factor2, coefficient; a target to cut wide matrices into blocks of columns)
  Operand factor, factor2;
  std::vector<int32_t> factor_row, factor2_row;
  int coefficient_matrix = -1;      // the values of this matrix, one per row
  bool second = false;              // product
  Operand addend;                   // product, pull
  // keep, pull, gradient: `carries` a tangent in slot 1 of source and target (gradient: of both factors)
  bool carries = false, curvature = false, raw = false;
  int slope_from = 0;  // sparseflow::SlopeFrom
  Operand kept, slope_cotangent, value;  // pull: what keep kept; the cotangent of d; where keep put its value and tangent
  int sum = -1;                          // gradient
  // pointwise: an expression over some rows. One row of an input, or one number of a vector, may serve them all.
  struct Input {
    Operand rows;
    bool broadcast = false;
    bool same(const Input& o) const { return rows.same(o.rows) && broadcast == o.broadcast; }
  };
  struct Numbers {
    int vector = -1, first = 0;
    bool broadcast = false;
    bool same(const Numbers& o) const { return vector == o.vector && first == o.first && broadcast == o.broadcast; }
  };
  int expression = -1, rows = 0;
  std::vector<Input> inputs;
  std::vector<Numbers> vectors;
  std::vector<Operand> outputs;  // buffer -1: added to the trace, summed over rows
  // A place of the expression (an input, or one that was written), summed over rows into one row.
  struct Total {
    int place = 0;
    Operand target;
    bool same(const Total& o) const { return place == o.place && target.same(o.target); }
  };
  std::vector<Total> totals;
  bool tangent() const { return (kind == OpKind::kAffine && store >= 4) || carries; }
  // Word for word the same: over the same buffers, with the same numbers. A list may say an operation again, which engines
  // then hold once; a gradient said again adds to the same sum.
  bool repeats(const Op& o) const {
    auto same = [](const Operand& a, const Operand& b) { return a.same(b); };
    auto all_same = [](const auto& a, const auto& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& one, const auto& other) { return one.same(other); });
    };
    return kind == o.kind && matrix == o.matrix && transposed == o.transposed && same(source, o.source) && same(target, o.target) &&
           modulation == o.modulation && activation == o.activation && params.a == o.params.a && params.b == o.params.b &&
           store == o.store && same(seed, o.seed) && same(weight, o.weight) && same(factor, o.factor) && same(factor2, o.factor2) &&
           coefficient_matrix == o.coefficient_matrix && second == o.second && same(addend, o.addend) && carries == o.carries &&
           curvature == o.curvature && raw == o.raw && slope_from == o.slope_from && same(kept, o.kept) &&
           same(slope_cotangent, o.slope_cotangent) && same(value, o.value) && sum == o.sum && factor_row == o.factor_row &&
           factor2_row == o.factor2_row && expression == o.expression && rows == o.rows && all_same(inputs, o.inputs) &&
           all_same(vectors, o.vectors) && all_same(outputs, o.outputs) && all_same(totals, o.totals);
  }
  bool reduces() const {
    if (kind == OpKind::kPointwise) return std::any_of(outputs.begin(), outputs.end(), [](const Operand& o) { return o.buffer < 0; });
    return kind == OpKind::kReduction || (kind == OpKind::kAffine && (store == 3 || store == 5));
  }
};

template <class T>
struct Program {
  int dim = 0;   // rows of the input
  int out = -1;  // rows of the output; -1: dim
  bool divergence = false;
  std::vector<Matrix<T>> matrices;
  std::vector<Modulation<T>> modulations;
  std::vector<RowVector<T>> vectors;
  std::vector<Expression> expressions;
  std::vector<Buffer> buffers;
  int input = -1, output = -1, noise = -1, ones = -1;  // buffers with a meaning of their own
  int context = -1;  // a buffer of numbers given per sample, for a whole call
  // The time answer: numbers that depend on time alone, so many for an evaluation. Another program gives them, or they are
  // one of the refresh callback's answers.
  int time_rows = 0, time_external = -1;
  std::vector<Op> prologue;  // once per tile and step: what depends on the noise and the context alone
  std::vector<Op> body;      // every evaluation
  int externals = 0;         // answers expected from the refresh callback

  // An adjoint program: `body` evaluates f, `keep` does so again and keeps what `reverse` needs, which turns the
  // cotangents of f (and of the trace) into that of the state, and sums up those of everything trained. Noise, where there
  // is any, lies in slot 1 of the input; `ones` is one row of ones.
  std::vector<Op> keep, reverse;
  int cotangent = -1, trace_cotangent = -1, state_cotangent = -1;  // buffers
  int context_cotangent = -1;                                      // a buffer, or -1: not wanted
  struct Sum {
    int size = 0;
    bool each_stage = false;  // its meaning depends on time: it is taken away after every evaluation
  };
  std::vector<Sum> sums;
  bool adjoint() const { return cotangent >= 0; }
  int out_rows() const { return out < 0 ? dim : out; }
  int context_rows() const { return context < 0 ? 0 : buffers[context].rows; }
};

}  // namespace sparseflow
