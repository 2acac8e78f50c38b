#include "validate.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace sparseflow {
namespace {

template <class Container>
void check_range(const Container& values, int low, int high, const std::string& what) {
  for (auto v : values)
    if (v < low || v >= high) fail(what + " " + std::to_string(v) + " is outside [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

// Everything that packing computes from it fits 32 bits then.
template <class T>
void validate_window(const Matrix<T>& m, const std::string& name) {
  const Window& w = m.window;
  constexpr int kMost = 1 << 20;
  for (int axis = 0; axis < 2; ++axis) {
    for (int size : {w.source[axis], w.target[axis], w.kernel[axis], w.stride[axis], w.dilation[axis]})
      if (size < 1 || size > kMost) fail(name + ": sizes, strides and dilations of a window lie from 1 to " + std::to_string(kMost));
    if (w.padding[axis] < -kMost || w.padding[axis] > kMost) fail(name + ": a window's padding lies within " + std::to_string(kMost));
    if (int64_t(w.kernel[axis]) * w.dilation[axis] > kMost || int64_t(w.target[axis]) * w.stride[axis] > 64 * kMost)
      fail(name + ": a window reaches further than " + std::to_string(kMost));
  }
  const int64_t taps = int64_t(w.kernel[0]) * w.kernel[1], from = int64_t(w.source[0]) * w.source[1], to = int64_t(w.target[0]) * w.target[1];
  if (taps > kMostRows || from > kMostRows || to > kMostRows) fail(name + ": a window of more pixels than 32-bit offsets reach");
  if (m.rows < 0 || m.cols < 0 || m.rows % to != 0 || m.cols % from != 0) fail(name + ": rows and columns must be whole planes");
  if (m.dynamic()) fail(name + ": a convolution does not depend on time");
  // the rows of all source planes, or of all target planes, that one row of pixels reads, in the widest tile with tangents
  const int64_t reach[2] = {int64_t(w.kernel[0]) * w.dilation[0], int64_t(w.kernel[1]) * w.dilation[1]};
  const int64_t forward = (m.cols / from) * (int64_t(w.target[1]) * w.stride[1] + reach[1]) * reach[0];
  const int64_t back = (m.rows / to) * (int64_t(w.source[1]) + reach[1]) * reach[0];
  if (std::max(forward, back) > (int64_t(1) << 31) / 1024) fail(name + ": a convolution's rows are too long for 32-bit offsets");
}

template <class T>
void validate_matrix(const Matrix<T>& m, const Program<T>& p, const std::string& name) {
  int rows = m.rows;
  int64_t cols = m.cols;
  if (m.window.present()) {
    validate_window(m, name);
    rows = m.rows / m.window.target_area();
    cols = int64_t(m.cols / m.window.source_area()) * m.window.taps();
    if (cols > INT32_MAX) fail(name + ": more taps than 32-bit offsets reach");
  }
  if (m.col.size() > size_t(kMostEntries) || m.path_entry.size() > size_t(kMostEntries))
    fail(name + ": more than " + std::to_string(kMostEntries) + " entries or paths, too many for 32-bit offsets");
  if (rows < 0 || cols < 0 || static_cast<int64_t>(m.row_ptr.size()) != int64_t(rows) + 1 || m.row_ptr.front() != 0 ||
      m.row_ptr.back() != m.nnz())
    fail(name + ": row pointers do not fit " + std::to_string(rows) + " rows and " + std::to_string(m.nnz()) + " entries");
  for (int i = 0; i < rows; ++i)
    if (m.row_ptr[i] > m.row_ptr[i + 1]) fail(name + ": row pointers decrease");
  check_range(m.col, 0, static_cast<int>(cols), name + ": column");
  for (int i = 0; i < rows; ++i)
    for (int e = m.row_ptr[i] + 1; e < m.row_ptr[i + 1]; ++e)
      if (m.col[e - 1] >= m.col[e]) fail(name + ": the columns of a row must ascend");
  if (m.dynamic()) {
    if (m.gated) {
      if (m.external >= 0) fail(name + ": gated or external, not both");
      if (m.gate_modulation < 0 || m.gate_modulation >= static_cast<int>(p.modulations.size())) fail(name + ": no such gate");
      if (p.modulations[m.gate_modulation].of_vectors()) fail(name + ": a gate is no row vector");
      if (m.path_entry.size() != m.path_gate.size() || m.path_entry.size() != m.path_constant.size())
        fail(name + ": path arrays of different lengths");
      check_range(m.path_entry, 0, m.nnz(), name + ": path entry");
      if (!std::is_sorted(m.path_entry.begin(), m.path_entry.end())) fail(name + ": path entries must ascend");
      check_range(m.path_gate, 0, p.modulations[m.gate_modulation].n, name + ": path gate");
    } else if (m.external >= p.externals) {
      fail(name + ": no such external");
    }
  } else if (static_cast<int>(m.values.size()) != m.nnz()) {
    fail(name + ": " + std::to_string(m.values.size()) + " values for " + std::to_string(m.nnz()) + " entries");
  }
}

template <class T>
void validate_vectors(const Program<T>& p) {
  if (p.time_rows < 0 || p.time_rows > kMostRows) fail("the time answer has " + std::to_string(p.time_rows) + " rows");
  if (p.time_external >= p.externals || (p.time_external >= 0 && p.time_rows == 0)) fail("the time answer is no such external");
  for (size_t i = 0; i < p.vectors.size(); ++i) {
    const RowVector<T>& v = p.vectors[i];
    const std::string name = "row vector " + std::to_string(i);
    if (v.n < 0 || v.n > kMostRows) fail(name + ": " + std::to_string(v.n) + " rows");
    if (v.timed() && int64_t(v.time_row) + v.n > p.time_rows) fail(name + ": the time answer has too few rows");
    if (static_cast<int>(v.values.size()) != (v.timed() ? 0 : v.n)) fail(name + ": " + std::to_string(v.values.size()) + " values for " + std::to_string(v.timed() ? 0 : v.n));
  }
}

template <class T>
void validate_op(const Op& op, const Program<T>& p, const std::string& name) {
  auto rows_of = [&](const Operand& o, const char* role) {
    if (o.buffer < 0 || o.buffer >= static_cast<int>(p.buffers.size())) fail(name + ": no such " + role + " buffer");
    if (o.slot < 0 || o.slot >= p.buffers[o.buffer].slots) fail(name + ": no such " + role + " slot");
    if (o.row < 0 || o.row > p.buffers[o.buffer].rows) fail(name + ": the " + role + " has no such first row");
    return p.buffers[o.buffer].rows - o.row;
  };
  auto need = [&](const Operand& o, int rows, const char* role) {
    if (rows_of(o, role) < rows) fail(name + ": the " + role + " buffer has too few rows");
  };
  if (op.kind < OpKind::kAffine || op.kind > OpKind::kPointwise) fail(name + ": unknown kind");
  if (op.kind == OpKind::kPointwise) return validate_pointwise(op, p, name);
  if (op.carries && op.kind < OpKind::kKeep) fail(name + ": only an adjoint's operations say that they carry a tangent");
  if (op.matrix < 0 || op.matrix >= static_cast<int>(p.matrices.size())) fail(name + ": no such matrix");
  // packing looks at every operand, used or not
  auto optional = [&](const Operand& o, const char* role) {
    if (o.buffer >= 0) rows_of(o, role);
  };
  optional(op.target, "target"), optional(op.seed, "seed"), optional(op.weight, "weight");
  optional(op.factor, "factor"), optional(op.factor2, "factor2"), optional(op.addend, "addend");
  optional(op.kept, "kept"), optional(op.slope_cotangent, "slope cotangent"), optional(op.value, "value");
  if ((op.kind == OpKind::kProduct || op.kind == OpKind::kReduction) && op.modulation >= 0) fail(name + ": only a layer has a modulation");
  if (op.kind != OpKind::kReduction && op.coefficient_matrix >= 0) fail(name + ": only a reduction has coefficients");
  const int rows = op.transposed ? p.matrices[op.matrix].cols : p.matrices[op.matrix].rows;
  const int cols = op.transposed ? p.matrices[op.matrix].rows : p.matrices[op.matrix].cols;
  if (rows_of(op.source, "source") < cols) fail(name + ": the source has fewer rows than the matrix has columns");
  auto slots = [&](const Operand& o, int count, const char* role) {
    if (rows_of(o, role), p.buffers[o.buffer].slots < o.slot + count) fail(name + ": the " + role + " buffer has too few slots");
  };
  const bool of_graphs = op.kind == OpKind::kAffine || op.kind == OpKind::kProduct || op.kind == OpKind::kGradient;
  if (p.matrices[op.matrix].window.present() && !of_graphs) fail(name + ": this operation has no kernels for convolutions");
  if (op.kind == OpKind::kGradient) {
    need(op.factor, rows, "factor");
    if (op.transposed) fail(name + ": a gradient has the matrix as it is");
    if (op.carries) slots(op.source, 2, "source"), slots(op.factor, 2, "factor");
    if (op.sum < 0 || op.sum >= static_cast<int>(p.sums.size()) || p.sums[op.sum].size != p.matrices[op.matrix].nnz())
      fail(name + ": one sum per entry is needed");
    return;
  }
  if (op.kind != OpKind::kReduction || op.target.buffer >= 0) {
    need(op.target, rows, "target");
    const bool apart = op.target.row >= int64_t(op.source.row) + cols || op.source.row >= int64_t(op.target.row) + rows;
    if (op.target.buffer == op.source.buffer && !apart && (op.kind != OpKind::kProduct || op.target.slot == op.source.slot || op.second))
      fail(name + ": source and target must differ");
  }
  if (op.second) slots(op.target, 2, "target");
  if (op.addend.buffer >= 0) need(op.addend, rows, "addend");
  if (op.kind == OpKind::kKeep || op.kind == OpKind::kPull) {
    if (op.slope_from < 0 || op.slope_from >= kSlopesFrom) fail(name + ": unknown origin of a slope");
    const bool recovered = op.slope_from != 0;
    if (!recovered || op.raw) {
      need(op.kept, rows, "kept");
      slots(op.kept, (recovered ? 0 : 1 + op.curvature) + op.raw, "kept");
    }
    if (op.target.slot != 0 || op.source.slot != 0 || op.kept.slot != 0) fail(name + ": operands start at slot 0");
    if (op.carries) slots(op.source, 2, "source");
    if (op.carries && !op.curvature) fail(name + ": the adjoint of a tangent needs the curvature");
    slots(op.target, (op.carries ? 2 : 1) + (op.kind == OpKind::kPull && op.raw), "target");
    for (const Operand* other : {&op.target, &op.source})
      if (other->buffer == op.kept.buffer) fail(name + ": what is kept lies in a buffer of its own");
    if (op.kind == OpKind::kPull) {
      if (op.addend.buffer >= 0) slots(op.addend, op.carries ? 2 : 1, "addend");
      if (op.slope_cotangent.buffer >= 0) {
        need(op.slope_cotangent, rows, "slope cotangent");
        if (op.carries || !op.curvature || recovered) fail(name + ": the cotangent of a slope needs a kept curvature, and no tangent");
      }
      if (recovered || (op.carries && op.raw)) need(op.value, rows, "value"), slots(op.value, op.carries ? 2 : 1, "value");
      if (op.modulation < 0 || op.modulation >= static_cast<int>(p.modulations.size()) || p.modulations[op.modulation].n != rows)
        fail(name + ": the modulation does not fit the matrix");
      return;
    }
  }
  if (op.kind == OpKind::kAffine || op.kind == OpKind::kKeep) {
    if (op.transposed) fail(name + ": a layer has the matrix as it is");
    if (op.modulation < 0 || op.modulation >= static_cast<int>(p.modulations.size()) || p.modulations[op.modulation].n != rows)
      fail(name + ": the modulation does not fit the matrix");
    if (op.store < 0 || op.store > 5) fail(name + ": unknown store");
    const int activation = static_cast<int>(op.activation);
    if (activation < 0 || activation >= kActivations) fail(name + ": unknown activation");
    if (op.kind == OpKind::kKeep) return;
    if (op.tangent() && (p.buffers[op.source.buffer].slots < 2 || op.source.slot != 0)) fail(name + ": the source carries no tangent");
    if (op.target.slot != 0) fail(name + ": an affine target starts at slot 0");
    const bool second_slot = op.store == 1 || op.store == 2 || op.store == 4;
    // a tangent whose matrix is cut into column blocks keeps its partial sums in the second slot
    if ((second_slot || op.tangent()) && p.buffers[op.target.buffer].slots < 2) fail(name + ": the target needs two slots");
    if (op.store == 2 || op.store == 3) need(op.seed, rows, "seed");
    if (op.store == 3 || op.store == 5) need(op.weight, rows, "weight");
  } else {
    auto check_factor = [&](const Operand& o, const std::vector<int32_t>& index, const char* role) {
      if (o.buffer < 0) return;
      const int have = rows_of(o, role);
      if (index.empty()) {
        if (have < rows) fail(name + ": the " + role + " buffer has too few rows");
      } else {
        if (static_cast<int>(index.size()) != rows) fail(name + ": one " + role + " row per matrix row is needed");
        check_range(index, 0, have, name + ": " + role + " row");
      }
    };
    check_factor(op.factor, op.factor_row, "factor");
    check_factor(op.factor2, op.factor2_row, "factor2");
    if (op.coefficient_matrix >= 0) {
      if (op.coefficient_matrix >= static_cast<int>(p.matrices.size()) || p.matrices[op.coefficient_matrix].rows != 1 ||
          p.matrices[op.coefficient_matrix].nnz() != rows)
        fail(name + ": one coefficient per matrix row is needed");
    }
  }
  if (op.reduces() && !p.divergence) fail(name + ": a reduction needs a program with divergence");
}

}  // namespace

template <class T>
Entries entries_of(const Matrix<T>& m, bool transposed) {
  Entries out;
  out.entry.resize(m.nnz());
  if (!transposed) {
    out.rows = m.rows, out.cols = m.cols, out.row_ptr = m.row_ptr, out.col = m.col;
    std::iota(out.entry.begin(), out.entry.end(), 0);
    return out;
  }
  out.rows = m.cols, out.cols = m.rows;
  out.row_ptr.assign(size_t(m.cols) + 1, 0);
  out.col.resize(m.nnz());
  for (int32_t c : m.col) ++out.row_ptr[c + 1];
  for (int c = 0; c < m.cols; ++c) out.row_ptr[c + 1] += out.row_ptr[c];
  std::vector<int32_t> next(out.row_ptr.begin(), out.row_ptr.end() - 1);
  for (int i = 0; i < m.rows; ++i)
    for (int e = m.row_ptr[i]; e < m.row_ptr[i + 1]; ++e) {
      const int32_t k = next[m.col[e]]++;
      out.col[k] = i;
      out.entry[k] = e;
    }
  return out;
}

template <class T>
void validate(const Program<T>& p) {
  const int n_buffers = static_cast<int>(p.buffers.size());
  int64_t rows = 0;
  for (const Buffer& b : p.buffers) {
    if (b.rows < 0 || b.slots < 1 || b.slots > 3) fail("a buffer needs rows >= 0 and one to three slots");
    rows += (int64_t(b.rows) + 1) * b.slots;
  }
  if (rows > kMostRows) fail("the layers are too wide for 32-bit offsets");
  auto check_buffer = [&](int id, const char* name, int rows, bool optional) {
    if ((id < 0 && !optional) || id >= n_buffers) fail(std::string("no ") + name + " buffer");
    if (id >= 0 && p.buffers[id].rows != rows) fail(std::string("the ") + name + " buffer has the wrong size");
  };
  if (p.externals < 0) fail("the number of externals is negative");
  check_buffer(p.input, "input", p.dim, false);
  check_buffer(p.output, "output", p.out_rows(), false);
  check_buffer(p.noise, "noise", p.dim, true);
  check_buffer(p.ones, "ones", 1, true);
  if (p.divergence && p.out_rows() > p.dim) fail("a divergence needs no more rows out than in");
  if (p.context >= n_buffers) fail("no context buffer");
  for (int id : {p.input, p.noise, p.ones, p.context})  // whole rows are copied into these
    if ((!p.adjoint() || id == p.context) && id >= 0 && p.buffers[id].slots != 1) fail("the input, noise, ones and context buffers have one slot");
  for (int id : {p.input, p.noise, p.ones, p.output, p.cotangent, p.trace_cotangent})
    if (id >= 0 && id == p.context) fail("the context has a buffer of its own");
  validate_vectors(p);
  validate_expressions(p);
  for (size_t i = 0; i < p.modulations.size(); ++i) {
    const Modulation<T>& m = p.modulations[i];
    const size_t n = static_cast<size_t>(m.n);
    auto fits = [&](const std::vector<T>& v, bool optional) { return v.size() == n || (optional && v.empty()); };
    for (int vector : {m.scale_vector, m.shift_vector})
      if (vector >= static_cast<int>(p.vectors.size()) || (vector >= 0 && p.vectors[vector].n != m.n))
        fail("modulation " + std::to_string(i) + ": its row vector does not fit");
    if (m.of_vectors() && (!m.bias.empty() || m.dynamic() || m.shift_sum >= 0 || m.gate_sum >= 0 || m.n < 0 || m.n > kMostRows))
      fail("modulation " + std::to_string(i) + ": of row vectors, or of a bias, gates, shifts and sums, not both");
    if (!fits(m.bias, m.of_vectors()) || !fits(m.gate_slope, true) || m.gate_slope.size() != m.gate_offset.size() ||
        !fits(m.shift_slope, true) || m.shift_slope.size() != m.shift_offset.size())
      fail("modulation " + std::to_string(i) + ": arrays of different lengths");
    if (m.external_gate >= p.externals || m.external_shift >= p.externals) fail("modulation " + std::to_string(i) + ": no such external");
  }
  for (size_t i = 0; i < p.matrices.size(); ++i) validate_matrix(p.matrices[i], p, "matrix " + std::to_string(i));
  for (size_t i = 0; i < p.prologue.size(); ++i) {
    const Op& op = p.prologue[i];
    validate_op(op, p, "prologue operation " + std::to_string(i));
    bool timed = op.kind == OpKind::kProduct && p.matrices[op.matrix].dynamic();
    for (const Op::Numbers& v : op.vectors) timed = timed || (op.kind == OpKind::kPointwise && p.vectors[v.vector].timed());
    if ((op.kind != OpKind::kProduct && op.kind != OpKind::kPointwise) || timed || op.reduces())
      fail("the prologue holds products and pointwise operations only, of what does not depend on time");
  }
  for (size_t i = 0; i < p.body.size(); ++i) {
    validate_op(p.body[i], p, "operation " + std::to_string(i));
    if (p.body[i].kind >= OpKind::kKeep && p.body[i].kind != OpKind::kPointwise) fail("operation " + std::to_string(i) + ": it belongs to an adjoint's lists");
  }
  for (int id : {p.trace_cotangent, p.state_cotangent})
    if (id >= n_buffers) fail("a cotangent names buffer " + std::to_string(id) + ", and there are " + std::to_string(n_buffers));
  if (!p.adjoint()) {
    if (!p.keep.empty() || !p.reverse.empty() || !p.sums.empty()) fail("keep, reverse and sums belong to an adjoint, which names a cotangent");
    if (p.context_cotangent >= 0) fail("the context's cotangent belongs to an adjoint, which names a cotangent of f");
    return;
  }
  check_buffer(p.cotangent, "cotangent", p.out_rows(), false);
  check_buffer(p.state_cotangent, "state cotangent", p.dim, false);
  check_buffer(p.context_cotangent, "context cotangent", p.context_rows(), true);
  if (p.context_cotangent >= 0 && p.context < 0) fail("a context's cotangent, and no context");
  if (p.divergence && (p.trace_cotangent < 0 || p.trace_cotangent >= n_buffers || p.buffers[p.trace_cotangent].rows != 1))
    fail("the trace's cotangent needs a buffer of one row");
  auto outside = [](const auto& all, auto is) { return std::any_of(all.begin(), all.end(), is); };
  if (outside(p.modulations, [](const Modulation<T>& m) { return m.external_gate >= 0 || m.external_shift >= 0; }) ||
      outside(p.matrices, [](const Matrix<T>& m) { return !m.gated && m.external >= 0; }))
    fail("an adjoint's only function of time that lives outside is the time answer");
  if (p.noise >= 0 && (p.noise != p.input || p.buffers[p.input].slots < 2)) fail("an adjoint's noise lies in slot 1 of the input");
  for (size_t i = 0; i < p.keep.size(); ++i) {
    validate_op(p.keep[i], p, "keep operation " + std::to_string(i));
    if (p.keep[i].kind == OpKind::kGradient) fail("keep operation " + std::to_string(i) + ": gradients belong to the reverse list");
  }
  for (size_t i = 0; i < p.reverse.size(); ++i) validate_op(p.reverse[i], p, "reverse operation " + std::to_string(i));
  std::vector<const Op*> taken(p.sums.size(), nullptr);
  for (const Op& op : p.reverse) {
    if (op.kind != OpKind::kGradient) continue;
    if (taken[op.sum] != nullptr && !taken[op.sum]->repeats(op)) fail("two different gradients add to one sum");
    taken[op.sum] = &op;
  }
  auto check_sum = [&](int sum, int size, bool each_stage, const std::string& name) {
    if (sum < 0) return;
    if (sum >= static_cast<int>(p.sums.size()) || p.sums[sum].size != size || (size > 0 && p.sums[sum].each_stage != each_stage)) fail(name + ": its sum does not fit");
  };
  for (size_t i = 0; i < p.vectors.size(); ++i) check_sum(p.vectors[i].sum, p.vectors[i].n, p.vectors[i].timed(), "row vector " + std::to_string(i));
  for (size_t i = 0; i < p.matrices.size(); ++i) check_sum(p.matrices[i].sum, p.matrices[i].nnz(), p.matrices[i].dynamic(), "matrix " + std::to_string(i));
  for (size_t i = 0; i < p.modulations.size(); ++i) {
    const Modulation<T>& m = p.modulations[i];
    check_sum(m.shift_sum, m.n, m.dynamic(), "modulation " + std::to_string(i));
    check_sum(m.gate_sum, m.n, true, "modulation " + std::to_string(i));
    if (m.shift_sum >= 0 && !m.gate_slope.empty() && m.gate_sum < 0) fail("modulation " + std::to_string(i) + ": a gate needs a sum of its own");
  }
}

template void validate(const Program<float>&);
template void validate(const Program<double>&);
template Entries entries_of(const Matrix<float>&, bool);
template Entries entries_of(const Matrix<double>&, bool);

}  // namespace sparseflow
