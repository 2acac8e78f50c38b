// A vector field as a native engine receives it: matrices, time modulations, buffers, and a short list of operations
// over them. sparseflow_kernels/engines/program.py writes such programs; this header says what they mean.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "activations.h"

namespace sparseflow {

// CSR. Where `gated`, the values depend on time through the output gate g of one modulation:
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

  bool dynamic() const { return gated || external >= 0; }
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

  bool dynamic() const { return !gate_slope.empty() || !shift_slope.empty() || external_gate >= 0 || external_shift >= 0; }
};

struct Buffer {
  int rows = 0;
  int slots = 1;
};

struct Operand {
  int buffer = -1;  // -1: absent
  int slot = 0;
};

enum class OpKind : int { kAffine = 0, kProduct = 1, kReduction = 2 };

struct Op {
  OpKind kind = OpKind::kAffine;
  int matrix = -1;
  Operand source, target;
  // affine
  int modulation = -1;
  Activation activation = Activation::kIdentity;
  ActivationParams params;
  int store = 0;  // sparseflow::Store
  Operand seed, weight;
  // product (factor), reduction (factor, factor2, coefficient; a target to cut wide matrices into blocks of columns)
  Operand factor, factor2;
  std::vector<int32_t> factor_row, factor2_row;
  int coefficient_matrix = -1;      // the values of this matrix, one per row
  bool tangent() const { return kind == OpKind::kAffine && store >= 4; }
  bool reduces() const { return kind == OpKind::kReduction || (kind == OpKind::kAffine && (store == 3 || store == 5)); }
};

template <class T>
struct Program {
  int dim = 0;
  bool divergence = false;
  std::vector<Matrix<T>> matrices;
  std::vector<Modulation<T>> modulations;
  std::vector<Buffer> buffers;
  int input = -1, output = -1, noise = -1, ones = -1;  // buffers with a meaning of their own
  std::vector<Op> prologue;  // once per tile and step: what depends on the noise alone
  std::vector<Op> body;      // every evaluation
  int externals = 0;         // answers expected from the refresh callback
};

}  // namespace sparseflow
