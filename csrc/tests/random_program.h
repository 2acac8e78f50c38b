// What the native tests share: counting what passes, and random programs of every shape a writer makes, or spoiled.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "../field.h"
#include "../tableau.h"

namespace sparseflow::testing {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 40) std::printf("FAILED: %s\n", what.c_str());
}

template <class F>
std::string thrown(F body) {  // the message of what body throws, or ""
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

using Random = std::mt19937;
inline int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
inline bool chance(Random& random, double p) { return std::uniform_real_distribution<double>(0, 1)(random) < p; }
// in float32, so that a program means the same in both precisions
inline double number(Random& random) { return static_cast<float>(std::uniform_real_distribution<double>(-1, 1)(random)); }
inline std::vector<double> numbers(Random& random, int n) {
  std::vector<double> out(n);
  for (double& x : out) x = number(random);
  return out;
}

// ------------------------------------------------------------------------------------------------- random programs

inline Matrix<double> random_matrix(Random& random, int rows, int cols, double density) {
  Matrix<double> m;
  m.rows = rows;
  m.cols = cols;
  m.row_ptr.push_back(0);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j)
      if (chance(random, density)) m.col.push_back(j), m.values.push_back(number(random) / std::sqrt(1 + density * cols));
    m.row_ptr.push_back(m.nnz());
  }
  return m;
}

inline int add(Program<double>& p, Matrix<double> m) {
  p.matrices.push_back(std::move(m));
  return static_cast<int>(p.matrices.size()) - 1;
}

inline int add_buffer(Program<double>& p, int rows, int slots) {
  p.buffers.push_back({rows, slots});
  return static_cast<int>(p.buffers.size()) - 1;
}

inline int add_modulation(Random& random, Program<double>& p, int n) {
  Modulation<double> m;
  m.n = n;
  m.bias = numbers(random, n);
  const int gate = pick(random, 0, 3), shift = pick(random, 0, 3);
  if (gate == 1) m.gate_slope = numbers(random, n), m.gate_offset = numbers(random, n);
  if (gate == 2) m.external_gate = p.externals++;
  if (shift == 1) m.shift_slope = numbers(random, n), m.shift_offset = numbers(random, n);
  if (shift == 2) m.external_shift = p.externals++;
  p.modulations.push_back(std::move(m));
  return static_cast<int>(p.modulations.size()) - 1;
}

// Constant, gated by the last modulation, or external.
inline int add_dynamic(Random& random, Program<double>& p, int rows, int cols, double density) {
  Matrix<double> m = random_matrix(random, rows, cols, density);
  const int kind = pick(random, 0, 2), gates = p.modulations.back().n;
  if (kind == 1 && gates > 0) {
    m.gated = true;
    m.values.clear();
    m.gate_modulation = static_cast<int>(p.modulations.size()) - 1;
    for (int path = 0; m.nnz() > 0 && path < 2 * m.nnz(); ++path) {
      m.path_entry.push_back(pick(random, 0, m.nnz() - 1));
      m.path_gate.push_back(pick(random, 0, gates - 1));
      m.path_constant.push_back(number(random));
    }
    std::sort(m.path_entry.begin(), m.path_entry.end());
  } else if (kind == 2) {
    m.values.clear();
    m.external = p.externals++;
  }
  return add(p, std::move(m));
}

inline Op affine_op(Random& random, Program<double>& p, Operand source, Operand target, int store, double density) {
  const int cols = p.buffers[source.buffer].rows, rows = p.buffers[target.buffer].rows;
  Op op;
  op.kind = OpKind::kAffine;
  op.matrix = add(p, random_matrix(random, rows, cols, density));
  op.modulation = add_modulation(random, p, rows);
  op.source = source;
  op.target = target;
  op.store = store;
  op.activation = static_cast<Activation>(pick(random, 0, kActivations - 1));
  op.params = op.activation == Activation::kSoftplus ? ActivationParams{2.0, 1.5} : ActivationParams{0.75, 20.0};
  return op;
}

inline Op product_op(int matrix, Operand source, Operand target, Operand factor = {}) {
  Op op;
  op.kind = OpKind::kProduct;
  op.matrix = matrix;
  op.source = source;
  op.target = target;
  op.factor = factor;
  return op;
}

// A chain as the engine's writer makes them; `kind` 0: f alone, 1: slopes and reductions of every sort, 2: one tangent.
inline Program<double> random_program(Random& random, int kind) {
  Program<double> p;
  const int depth = pick(random, kind == 0 ? 0 : 1, 3);
  const double densities[] = {0.0, 0.05, 0.3, 1.0, 0.85};
  const int widths[] = {1, 2, 7, 30, 90};
  auto density = [&] { return densities[pick(random, 0, 4)]; };
  p.dim = pick(random, 1, 5);
  p.divergence = kind != 0;
  const int x = add_buffer(p, p.dim, 1);
  std::vector<int> h;
  for (int l = 0; l < depth; ++l) h.push_back(add_buffer(p, widths[pick(random, 0, 4)], kind == 0 ? 1 : 2));
  const bool reduce_last = kind == 2 && chance(random, 0.5);
  const int f = add_buffer(p, p.dim, reduce_last ? 2 : 1);
  p.input = x;
  p.output = f;
  if (kind == 2) {
    p.noise = add_buffer(p, p.dim, 1);
    const int u = add_buffer(p, p.buffers[h[0]].rows, 1), r = add_buffer(p, p.buffers[h.back()].rows, 1);
    for (int target : {u, r}) {
      const int matrix = add(p, random_matrix(random, p.buffers[target].rows, p.dim, density()));
      p.prologue.push_back(product_op(matrix, {p.noise, 0}, {target, 0}));
    }
    for (int l = 0; l < depth; ++l) {
      const bool reduce = !reduce_last && l + 1 == depth;
      const int store = l == 0 ? (reduce ? 3 : 2) : (reduce ? 5 : 4);
      Op op = affine_op(random, p, {l == 0 ? x : h[l - 1], 0}, {h[l], 0}, store, density());
      if (l == 0) op.seed = {u, 0};
      if (reduce) op.weight = {r, 0};
      p.body.push_back(op);
    }
    Op last = affine_op(random, p, {h.back(), 0}, {f, 0}, reduce_last ? 5 : 0, density());
    if (reduce_last) last.weight = {p.noise, 0};
    p.body.push_back(last);
    return p;
  }
  for (int l = 0; l <= depth; ++l) {
    const Operand source{l == 0 ? x : h[l - 1], 0}, target{l == depth ? f : h[l], 0};
    p.body.push_back(affine_op(random, p, source, target, kind == 1 && l < depth ? 1 : 0, density()));
  }
  if (kind == 0) return p;

  p.ones = add_buffer(p, 1, 1);
  const int first = p.buffers[h[0]].rows, last = p.buffers[h.back()].rows;
  const int scratch = add_buffer(p, last, 1);
  Op op;
  op.kind = OpKind::kReduction;
  op.source = {p.ones, 0};
  op.matrix = add_dynamic(random, p, 1, 1, 1.0);
  p.body.push_back(op);
  op.source = {h[0], 1};
  op.matrix = add_dynamic(random, p, last, first, density());
  op.factor = {h.back(), 1};
  p.body.push_back(op);
  const int terms = pick(random, 0, 40);
  op.matrix = add(p, random_matrix(random, terms, first, density()));
  op.factor2 = {h[0], 0};
  for (int i = 0; i < terms; ++i) {
    op.factor_row.push_back(pick(random, 0, last - 1));
    op.factor2_row.push_back(pick(random, 0, first - 1));
  }
  op.coefficient_matrix = add_dynamic(random, p, 1, terms, 1.0);
  p.body.push_back(op);
  p.body.push_back(product_op(add_dynamic(random, p, last, first, density()), {h[0], 1}, {scratch, 0}, {h.back(), 1}));
  if (chance(random, 0.5))
    for (int i = 0; i < last; ++i) p.body.back().factor_row.push_back(pick(random, 0, last - 1));
  Op sum;
  sum.kind = OpKind::kReduction;
  sum.source = {scratch, 0};
  sum.matrix = add_dynamic(random, p, 1, last, density());
  p.body.push_back(sum);
  return p;
}

template <class T>
Program<T> convert(const Program<double>& p) {
  if constexpr (sizeof(T) == 8) return p;
  auto cast = [](const std::vector<double>& v) { return std::vector<T>(v.begin(), v.end()); };
  Program<T> q;
  q.dim = p.dim, q.divergence = p.divergence, q.buffers = p.buffers, q.input = p.input, q.output = p.output;
  q.noise = p.noise, q.ones = p.ones, q.prologue = p.prologue, q.body = p.body, q.externals = p.externals;
  q.keep = p.keep, q.reverse = p.reverse, q.cotangent = p.cotangent, q.trace_cotangent = p.trace_cotangent;
  q.state_cotangent = p.state_cotangent, q.context_cotangent = p.context_cotangent;
  q.out = p.out, q.context = p.context, q.time_rows = p.time_rows, q.time_external = p.time_external, q.expressions = p.expressions;
  for (const auto& sum : p.sums) q.sums.push_back({sum.size, sum.each_stage});
  for (const auto& m : p.matrices) {
    Matrix<T> n;
    n.rows = m.rows, n.cols = m.cols, n.row_ptr = m.row_ptr, n.col = m.col, n.values = cast(m.values);
    n.gated = m.gated;
    n.gate_modulation = m.gate_modulation, n.path_entry = m.path_entry, n.path_gate = m.path_gate;
    n.path_constant = cast(m.path_constant), n.external = m.external, n.sum = m.sum;
    q.matrices.push_back(n);
  }
  for (const auto& m : p.modulations)
    q.modulations.push_back({m.n, cast(m.bias), cast(m.gate_slope), cast(m.gate_offset), cast(m.shift_slope), cast(m.shift_offset),
                             m.external_gate, m.external_shift, m.scale_vector, m.shift_vector, m.shift_sum, m.gate_sum});
  for (const auto& v : p.vectors) q.vectors.push_back({v.n, cast(v.values), v.time_row, v.sum});
  return q;
}

template <class T>
std::vector<T> random_states(Random& random, int n) {
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(number(random));
  return out;
}

inline Tableau bosh3() {
  Tableau t;
  t.order = 3;
  t.c = {0.5, 0.75, 1.0};
  t.a = {{0.5}, {0.0, 0.75}, {2.0 / 9, 1.0 / 3, 4.0 / 9}};
  t.b = {2.0 / 9, 1.0 / 3, 4.0 / 9, 0.0};
  t.b_error = {2.0 / 9 - 7.0 / 24, 1.0 / 3 - 0.25, 4.0 / 9 - 1.0 / 3, -0.125};
  t.b_mid = {0.0, 0.5, 0.0, 0.0};
  return t;
}

inline Tableau euler() {
  Tableau t;
  t.adaptive = false;
  t.order = 1;
  t.b = {1.0};
  return t;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Wide enough for the columns to be taken in blocks.
inline Program<double> wide_program(Random& random, int kind) {
  Program<double> p;
  p.dim = 3;
  p.divergence = kind != 0;
  p.buffers = {{3, 1}, {1500, 2}, {40, 2}, {3, 1}};
  p.input = 0;
  p.output = 3;
  if (kind == 2) p.noise = add_buffer(p, 3, 1), add_buffer(p, 1500, 1), add_buffer(p, 40, 1);
  Op first = affine_op(random, p, {0, 0}, {1, 0}, kind == 2 ? 2 : 1, 0.5);
  Op second = affine_op(random, p, {1, 0}, {2, 0}, kind == 2 ? 5 : 1, 0.3);
  first.activation = second.activation = Activation::kTanh;
  if (kind == 2) {
    first.seed = {5, 0};
    second.weight = {6, 0};
    p.prologue.push_back(product_op(add(p, random_matrix(random, 1500, 3, 0.4)), {p.noise, 0}, {5, 0}));
    p.prologue.push_back(product_op(add(p, random_matrix(random, 40, 3, 0.4)), {p.noise, 0}, {6, 0}));
  }
  p.body = {first, second, affine_op(random, p, {2, 0}, {3, 0}, 0, 0.5)};
  if (kind == 1) {
    Op op;
    op.kind = OpKind::kReduction;
    op.source = {1, 1};
    op.factor = {2, 1};
    op.target = {add_buffer(p, 40, 1), 0};
    for (double density : {0.02, 0.3, 0.3, 0.3}) {
      op.matrix = add_dynamic(random, p, 40, 1500, density);
      p.body.push_back(op);
      op.target = chance(random, 0.5) ? Operand{} : Operand{p.output + 1, 0};
    }
  }
  return p;
}

// A chain of layers with gates and shifts as engines/adjoint.py writes it: the plain field, or a tangent beside it.
inline Program<double> adjoint_program(Random& random, bool tangent) {
  Program<double> p;
  const int values = tangent ? 2 : 1, hidden = pick(random, 0, 3);
  p.dim = pick(random, 1, 6);
  p.divergence = tangent;
  std::vector<int> sizes{p.dim};
  for (int l = 0; l < hidden; ++l) sizes.push_back(pick(random, 1, 40));
  sizes.push_back(p.dim);
  auto buffer = [&](int rows, int slots) {
    p.buffers.push_back({rows, slots});
    return static_cast<int>(p.buffers.size()) - 1;
  };
  auto sum = [&](int size, bool each_stage) {
    p.sums.push_back({size, each_stage});
    return static_cast<int>(p.sums.size()) - 1;
  };
  const bool curvature = tangent;
  const Activation known[] = {Activation::kTanh, Activation::kSoftplus, Activation::kSin, Activation::kSilu, Activation::kSigmoid, Activation::kIdentity};
  const Activation recovered[] = {Activation::kIdentity, Activation::kTanh, Activation::kSigmoid};
  std::vector<Activation> activations;
  std::vector<int> from;  // SlopeFrom, by layer
  std::vector<int> chain{buffer(p.dim, values)}, kept;
  std::vector<bool> gated;
  int widest = p.dim;
  for (int l = 0; l <= hidden; ++l) {
    const int n = sizes[l + 1];
    widest = std::max(widest, n);
    p.matrices.push_back(random_matrix(random, n, sizes[l], chance(random, 0.2) ? 0.0 : 0.6));
    p.matrices.back().sum = sum(p.matrices.back().nnz(), false);
    Modulation<double> m;
    m.n = n;
    m.bias = numbers(random, n);
    gated.push_back(chance(random, 0.5));
    if (gated.back()) m.gate_slope = numbers(random, n), m.gate_offset = numbers(random, n);
    if (chance(random, 0.5)) m.shift_slope = numbers(random, n), m.shift_offset = numbers(random, n);
    m.shift_sum = sum(n, m.dynamic());
    if (gated.back()) m.gate_sum = sum(n, true);
    p.modulations.push_back(m);
    chain.push_back(buffer(n, values));
    activations.push_back(l == hidden ? Activation::kIdentity : known[pick(random, 0, 5)]);
    const int slope_from[] = {1, 2, 3};
    from.push_back(0);
    for (int i = 0; i < 3; ++i)
      if (activations.back() == recovered[i] && chance(random, 0.7)) from.back() = slope_from[i];
    const int kept_slots = (from.back() ? 0 : 1 + curvature) + gated.back();
    kept.push_back((l < hidden || gated.back()) && kept_slots > 0 ? buffer(n, kept_slots) : -1);
  }
  const int layers = hidden + 1;
  auto helper = [&](int rows, int cols, bool filled) {  // a column of ones or an identity; or nothing at all
    Matrix<double> m;
    m.rows = rows, m.cols = cols;
    for (int i = 0; i <= rows; ++i) m.row_ptr.push_back(filled ? i : 0);
    for (int i = 0; i < m.row_ptr.back(); ++i) m.col.push_back(cols == 1 ? 0 : i), m.values.push_back(1.0);
    p.matrices.push_back(m);
    return static_cast<int>(p.matrices.size()) - 1;
  };
  p.input = chain[0], p.output = chain.back(), p.noise = tangent ? p.input : -1;
  p.ones = buffer(1, 1);
  p.trace_cotangent = tangent ? buffer(1, 1) : -1;
  p.cotangent = buffer(p.dim, values), p.state_cotangent = buffer(p.dim, 1);
  const int turns[2] = {buffer(widest, values + 1), buffer(widest, values + 1)};
  for (int l = 0; l < layers; ++l) {
    Op op;
    op.matrix = l, op.modulation = l, op.source = {chain[l], 0}, op.target = {chain[l + 1], 0};
    op.activation = activations[l];
    p.body.push_back(op);
    if (l == hidden && !gated[l]) continue;
    op.kind = OpKind::kKeep;
    op.kept = {kept[l], 0}, op.carries = tangent, op.curvature = curvature, op.raw = gated[l], op.slope_from = from[l];
    p.keep.push_back(op);
  }
  if (tangent) {
    Op op;
    op.kind = OpKind::kProduct;
    op.matrix = helper(p.dim, p.dim, true), op.source = {p.input, 1}, op.target = {p.cotangent, 1};
    op.factor = {p.trace_cotangent, 0}, op.factor_row.assign(p.dim, 0);
    p.reverse.push_back(op);
  }
  Operand here{p.cotangent, 0};
  auto pull = [&](int matrix, bool transposed, int l) {
    Op op;
    op.kind = OpKind::kPull;
    op.matrix = matrix, op.transposed = transposed, op.source = transposed ? here : Operand{chain[0], 0};
    op.target = {turns[l % 2], 0}, op.kept = {kept[l], 0}, op.value = {chain[l + 1], 0};
    if (!transposed) op.addend = here;
    op.carries = tangent, op.curvature = curvature, op.raw = gated[l], op.modulation = l, op.slope_from = from[l];
    p.reverse.push_back(op);
    here = op.target;
  };
  auto gradient = [&](int matrix, Operand left, Operand right, int to, bool carries) {
    Op op;
    op.kind = OpKind::kGradient;
    op.matrix = matrix, op.factor = left, op.source = right, op.sum = to, op.carries = carries;
    p.reverse.push_back(op);
  };
  for (int l = hidden; l >= 0; --l) {
    if (l == hidden && gated[l]) pull(helper(p.dim, p.dim, false), false, l);
    gradient(l, here, {chain[l], 0}, p.matrices[l].sum, tangent);
    const int ones = helper(sizes[l + 1], 1, true);
    gradient(ones, here, {p.ones, 0}, p.modulations[l].shift_sum, false);
    if (gated[l]) gradient(ones, {here.buffer, values}, {p.ones, 0}, p.modulations[l].gate_sum, false);
    if (l > 0) {
      pull(l, true, l - 1);
    } else {
      Op op;
      op.kind = OpKind::kProduct;
      op.matrix = 0, op.transposed = true, op.source = here, op.target = {p.state_cotangent, 0};
      p.reverse.push_back(op);
    }
  }
  return p;
}

}  // namespace sparseflow::testing
