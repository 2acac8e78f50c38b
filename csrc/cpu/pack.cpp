#include "pack.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <stdexcept>

namespace sparseflow {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

template <class Container>
void check_range(const Container& values, int low, int high, const std::string& what) {
  for (auto v : values)
    if (v < low || v >= high) fail(what + " " + std::to_string(v) + " is outside [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

template <class T>
void validate_matrix(const Matrix<T>& m, const Program<T>& p, const std::string& name) {
  if (m.rows < 0 || m.cols < 0 || static_cast<int64_t>(m.row_ptr.size()) != int64_t(m.rows) + 1 || m.row_ptr.front() != 0 ||
      m.row_ptr.back() != m.nnz())
    fail(name + ": row pointers do not fit " + std::to_string(m.rows) + " rows and " + std::to_string(m.nnz()) + " entries");
  for (int i = 0; i < m.rows; ++i)
    if (m.row_ptr[i] > m.row_ptr[i + 1]) fail(name + ": row pointers decrease");
  check_range(m.col, 0, m.cols, name + ": column");
  for (int i = 0; i < m.rows; ++i)
    for (int e = m.row_ptr[i] + 1; e < m.row_ptr[i + 1]; ++e)
      if (m.col[e - 1] >= m.col[e]) fail(name + ": the columns of a row must ascend");
  if (m.dynamic()) {
    if (m.gated) {
      if (m.external >= 0) fail(name + ": gated or external, not both");
      if (m.gate_modulation < 0 || m.gate_modulation >= static_cast<int>(p.modulations.size())) fail(name + ": no such gate");
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
void validate_op(const Op& op, const Program<T>& p, const std::string& name) {
  auto rows_of = [&](const Operand& o, const char* role) {
    if (o.buffer < 0 || o.buffer >= static_cast<int>(p.buffers.size())) fail(name + ": no such " + role + " buffer");
    if (o.slot < 0 || o.slot >= p.buffers[o.buffer].slots) fail(name + ": no such " + role + " slot");
    return p.buffers[o.buffer].rows;
  };
  auto need = [&](const Operand& o, int rows, const char* role) {
    if (rows_of(o, role) < rows) fail(name + ": the " + role + " buffer has too few rows");
  };
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
    if (op.target.buffer == op.source.buffer && (op.kind != OpKind::kProduct || op.target.slot == op.source.slot || op.second))
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

// A matrix, or its transpose, as it is walked: entry[k] is where the value of the k-th lies in the matrix.
struct Entries {
  int rows, cols;
  std::vector<int32_t> row_ptr, col, entry;
  int nnz() const { return static_cast<int>(col.size()); }
};

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

// Columns per block: as many as let the activations a block reads live in a first-level cache, but no fewer than leave a
// dozen entries per row and block, below which reloading the sums costs more than it saves. A block's sums start from
// zero, which also bounds the rounding of long rows. The tile width plays no part: it must not change a bit.
template <class T>
int columns_per_block(const Entries& m, const Op& op) {
  const bool nowhere_to_wait = (op.kind == OpKind::kReduction && op.target.buffer < 0) ||
                               (op.kind == OpKind::kProduct && op.addend.buffer >= 0 && op.addend.buffer == op.target.buffer);
  if (nowhere_to_wait || m.rows == 0 || m.nnz() == 0) return std::max(1, m.cols);
  const double kFit = 36.0 * 1024 / (64 * sizeof(T) * (op.tangent() ? 2 : 1));  // 36 KB of 64 values each
  const double entries_per_column = double(m.nnz()) / m.rows / m.cols;
  const double wanted = std::max(kFit, 12.0 / entries_per_column);
  if (wanted >= m.cols) return m.cols;
  const int blocks = static_cast<int>(std::ceil(m.cols / wanted));
  return (m.cols + blocks - 1) / blocks;
}

// A block of columns on its way into a kernel's arrays: the entries [begin, end) of every row, and the rows in the order
// they are taken.
struct BlockRows {
  const Entries& m;
  std::vector<int32_t> begin, end, order;

  explicit BlockRows(const Entries& entries) : m(entries), end(m.row_ptr.begin(), m.row_ptr.end() - 1), order(m.rows) {}
  void advance(int column) {  // to the block that ends before this column
    begin = end;
    for (int i = 0; i < m.rows; ++i)
      while (end[i] < m.row_ptr[i + 1] && m.col[end[i]] < column) ++end[i];
    order.resize(m.rows);
    std::iota(order.begin(), order.end(), 0);
  }

  int length(int row) const { return row < m.rows ? end[row] - begin[row] : 0; }
  std::vector<int32_t> in_groups_of(int size) const {  // the last one filled up with m.rows, a row that does not exist
    std::vector<int32_t> rows((order.size() + size - 1) / size * size, m.rows);
    std::copy(order.begin(), order.end(), rows.begin());
    return rows;
  }
  int entry_at(int row, int column) const {  // -1: none
    if (length(row) == 0) return -1;
    const auto last = m.col.begin() + end[row], found = std::lower_bound(m.col.begin() + begin[row], last, column);
    return found != last && *found == column ? static_cast<int>(found - m.col.begin()) : -1;
  }
};

// The columns of a few rows of a block together, ascending, and how many entries the rows have there.
struct Union {
  std::vector<int32_t> columns;
  int entries = 0;

  Union(const BlockRows& block, const int32_t* rows, int count) {
    std::vector<int32_t> both;
    for (int r = 0; r < count; ++r) {
      if (block.length(rows[r]) == 0) continue;
      const auto col = block.m.col.begin();
      both.clear();
      std::set_union(columns.begin(), columns.end(), col + block.begin[rows[r]], col + block.end[rows[r]], std::back_inserter(both));
      columns.swap(both);
      entries += block.length(rows[r]);
    }
  }
};

// An inner product in a dense block takes this share of the time of one in a run (measured: 0.45 to 0.6 with AVX-512, 0.65
// with AVX2). Dense blocks also make the products of what is no entry; they are dropped.
constexpr double kDenseGradientShare = 0.6;

// Block of columns by block of columns, a few rows at a time: dense blocks where they would hold enough entries, else runs
// of entries of one row each, cut where a batch is full.
template <class T>
void pack_gradient(PackedOp<T>& out, const Op& op, const Program<T>& program, Packed<T>& packed, const Kernels<T>& kernels) {
  const Entries m = entries_of(program.matrices[op.matrix], false);
  out.gradient = kernels.gradient[op.carries][packed.width_index];
  if (out.gradient == nullptr) fail("this tile width has no gradient kernels");
  const ptrdiff_t slot_bytes = ptrdiff_t(packed.width) * ptrdiff_t(sizeof(T));
  auto address = [&](const Operand& o, int row) {
    return uint32_t(packed.buffer_offset[o.buffer] + o.slot * slot_bytes + row * packed.row_bytes(program.buffers[o.buffer]));
  };
  std::vector<int32_t> entry;  // those of the runs, whose sums come after the dense blocks'
  int filled = kGradientBatch;
  auto add_run = [&](const BlockRows& block, int row) {
    bool open = false;
    for (int e = block.begin[row]; e < block.end[row]; ++e, ++filled) {
      if (filled == kGradientBatch) out.runs_of_batch.push_back(0), filled = 0, open = false;
      if (!open) out.runs.push_back({address(op.factor, row), 0}), ++out.runs_of_batch.back(), open = true;
      ++out.runs.back().count;
      out.right.push_back(address(op.source, m.col[e]));
      entry.push_back(e);
    }
  };
  const int height = gradient_block_rows(kernels.lanes), width = kernels.lanes / height;
  auto add_dense = [&](const BlockRows& block, const int32_t* rows, const std::vector<int32_t>& columns) {
    for (size_t first = 0; first < columns.size(); first += width) {
      auto column = [&](int c) { return columns[std::min(first + c, columns.size() - 1)]; };
      for (int r = 0; r < height; ++r) out.dense.push_back(address(op.factor, std::min(rows[r], m.rows - 1)));
      for (int c = 0; c < width; ++c) out.dense.push_back(address(op.source, column(c)));
      for (int r = 0; r < height; ++r)
        for (int c = 0; c < width; ++c) out.entry.push_back(first + c < columns.size() ? block.entry_at(rows[r], column(c)) : -1);
    }
  };
  BlockRows block(m);
  const int per_block = columns_per_block<T>(m, op);
  for (int limit = per_block; limit < m.cols + per_block; limit += per_block) {
    block.advance(limit);
    const std::vector<int32_t> rows = block.in_groups_of(height);
    for (size_t first = 0; first < rows.size(); first += height) {
      const Union all(block, rows.data() + first, height);
      const size_t slots = (all.columns.size() + width - 1) / width * kernels.lanes;
      if (all.entries > kDenseGradientShare * double(slots)) {
        add_dense(block, rows.data() + first, all.columns);
      } else {
        for (int r = 0; r < height && rows[first + r] < m.rows; ++r) add_run(block, rows[first + r]);
      }
    }
  }
  size_t& sums = program.sums[op.sum].each_stage ? packed.stage_sums : packed.lasting_sums;
  out.sums = sums;
  sums += out.entry.size() + out.runs_of_batch.size() * kGradientBatch;
  out.entry.insert(out.entry.end(), entry.begin(), entry.end());
}

// A block of columns as a kernel reads it (PackedBlock).
template <class T>
struct Stream {
  Aligned<char> steps;
  std::vector<int32_t> counts, rows;
  bool dense = false;
};

// place(entry, byte) is told where in the steps the weight of each entry of the walk belongs.
template <class T, class Place>
Stream<T> sparse_stream(const BlockRows& block, int R, ptrdiff_t source_stride, Place place) {
  const Entries& m = block.m;
  Stream<T> out;
  out.rows = block.in_groups_of(R);
  out.counts.resize(out.rows.size() / R);
  for (size_t k = 0; k < out.rows.size(); ++k) out.counts[k / R] = std::max(out.counts[k / R], block.length(out.rows[k]));
  const size_t bytes = step_bytes<T>(R);
  out.steps = Aligned<char>(std::accumulate(out.counts.begin(), out.counts.end(), size_t(0)) * bytes);
  char* step = out.steps.get();
  for (size_t g = 0; g < out.counts.size(); ++g) {
    const int32_t* const rows = out.rows.data() + g * R;
    int fallback = 0;  // an activation row this group reads anyway, for the padding of an empty row
    for (int r = 0; r < R; ++r)
      if (block.length(rows[r]) > 0) fallback = m.col[block.begin[rows[r]]];
    for (int k = 0; k < out.counts[g]; ++k, step += bytes) {
      T* const weights = reinterpret_cast<T*>(step);
      uint32_t* const offsets = reinterpret_cast<uint32_t*>(weights + R);
      for (int r = 0; r < R; ++r) {
        const int n = block.length(rows[r]);
        const int entry = n > 0 ? block.begin[rows[r]] + std::min(k, n - 1) : -1;
        offsets[r] = static_cast<uint32_t>((entry >= 0 ? m.col[entry] : fallback) * source_stride);
        if (k < n) place(entry, reinterpret_cast<char*>(weights + r) - out.steps.get());  // else padding: weight zero
      }
    }
  }
  return out;
}

// A multiply-add of a dense step takes this share of the time of one in a sparse step (measured: 0.60 to 0.66 with AVX-512,
// 0.67 with AVX2).
constexpr double kDenseShare = 0.67;

// Every group has all columns of its rows, with weight zero where a row has no entry: an activation that overflowed makes
// NaN there, as it does in a dense product. The result is not `dense`, and empty, where too many weights would be such.
template <class T, class Place>
Stream<T> dense_stream(const BlockRows& block, int R, ptrdiff_t source_stride, Place place) {
  Stream<T> out;
  out.rows = block.in_groups_of(R);
  std::vector<int32_t> columns;  // group after group
  double entries = 0;
  for (size_t first = 0; first < out.rows.size(); first += R) {
    const Union all(block, out.rows.data() + first, R);
    out.counts.push_back(static_cast<int32_t>(all.columns.size()));
    columns.insert(columns.end(), all.columns.begin(), all.columns.end());
    entries += all.entries;
  }
  if (entries <= kDenseShare * double(columns.size()) * R) return {};
  out.dense = true;
  const size_t bytes = dense_step_bytes<T>(R);
  out.steps = Aligned<char>(columns.size() * bytes);
  const int32_t* column = columns.data();
  char* step = out.steps.get();
  for (size_t g = 0; g < out.counts.size(); ++g) {
    for (int k = 0; k < out.counts[g]; ++k, ++column, step += bytes) {
      T* const weights = reinterpret_cast<T*>(step);
      *reinterpret_cast<uint32_t*>(weights + R) = static_cast<uint32_t>(*column * source_stride);
      for (int r = 0; r < R; ++r) {
        const int entry = block.entry_at(out.rows[g * R + r], *column);
        if (entry >= 0) place(entry, reinterpret_cast<char*>(weights + r) - out.steps.get());
      }
    }
  }
  return out;
}

// Puts the values of a matrix where its product has them.
template <class T>
void set_weights(const PackedOp<T>& op, const std::vector<Aligned<char>>& streams, const T* values) {
  for (size_t e = 0; e < op.places.size(); ++e)
    *reinterpret_cast<T*>(streams[op.places[e].block].get() + op.places[e].byte) = values[e];
}

template <class T>
PackedOp<T> pack_op(const Op& op, const Program<T>& program, Packed<T>& packed, const Kernels<T>& kernels, int& dynamic_ops) {
  PackedOp<T> out;
  out.op = &op;
  if (op.kind == OpKind::kGradient) {
    pack_gradient(out, op, program, packed, kernels);
    return out;
  }
  const Matrix<T>& matrix = program.matrices[op.matrix];
  const Entries m = entries_of(matrix, op.transposed);
  const int w = packed.width_index;
  const bool tangent = op.tangent();
  const int R = tangent ? kernels.rows_in_flight_tangent[w] : kernels.rows_in_flight[w];
  const int dense_rows = tangent ? kernels.dense_rows_tangent[w] : kernels.dense_rows[w];
  const ptrdiff_t slot_bytes = ptrdiff_t(packed.width) * ptrdiff_t(sizeof(T));
  auto address = [&](const Operand& o) {
    return o.buffer < 0 ? ptrdiff_t(-1) : packed.buffer_offset[o.buffer] + o.slot * slot_bytes;
  };
  auto stride = [&](const Operand& o) { return o.buffer < 0 ? ptrdiff_t(0) : packed.row_bytes(program.buffers[o.buffer]); };
  out.source = address(op.source);
  out.target = address(op.target);
  out.seed = address(op.seed);
  out.weight = address(op.weight);
  out.factor = address(op.factor);
  out.factor2 = address(op.factor2);
  out.addend = address(op.addend);
  out.kept = address(op.kept);
  out.slope_cotangent = address(op.slope_cotangent);
  out.value = address(op.value);
  RowArgs<T>& args = out.args;
  args.target_stride = stride(op.target);
  args.seed_stride = stride(op.seed);
  args.weight_stride = stride(op.weight);
  args.factor_stride = stride(op.factor);
  args.factor2_stride = stride(op.factor2);
  args.addend_stride = stride(op.addend);
  args.kept_stride = stride(op.kept);
  args.slope_cotangent_stride = stride(op.slope_cotangent);
  args.value_stride = stride(op.value);
  args.second = op.second;
  args.curvature = op.curvature;
  args.raw = op.raw;
  args.slopes = op.slope_from == 0;
  args.store = static_cast<Store>(op.store);
  args.a = static_cast<T>(op.params.a);
  args.b = static_cast<T>(op.params.b);
  args.inverse_a = T(1) / args.a;
  args.factor_row = op.factor_row.empty() ? nullptr : op.factor_row.data();
  args.factor2_row = op.factor2_row.empty() ? nullptr : op.factor2_row.data();
  const int activation = static_cast<int>(op.activation);
  switch (op.kind) {
    case OpKind::kAffine: out.kernel = tangent ? kernels.affine_tangent[activation][w] : kernels.affine[activation][w]; break;
    case OpKind::kProduct: out.kernel = kernels.product[w]; break;
    case OpKind::kReduction: out.kernel = kernels.reduction[w]; break;
    case OpKind::kKeep: out.kernel = kernels.keep[op.carries][activation][w]; break;
    case OpKind::kPull: out.kernel = kernels.pull[op.slope_from][op.carries][w]; break;
    case OpKind::kGradient: break;
  }
  if (out.kernel == nullptr) fail("this tile width has no adjoint kernels");

  const ptrdiff_t source_stride = stride(op.source);
  const int per_block = columns_per_block<T>(m, op);
  const int n_blocks = std::max(1, (m.cols + per_block - 1) / per_block);
  out.places.resize(m.nnz());
  BlockRows block(m);
  for (int b = 0; b < n_blocks; ++b) {
    const bool last = b + 1 == n_blocks;
    block.advance(last ? m.cols : (b + 1) * per_block);
    // like rows beside each other, so that little is padded
    std::vector<int32_t>& order = block.order;
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return block.length(i) > block.length(j); });
    auto drop = [&](auto empty) { order.erase(std::remove_if(order.begin(), order.end(), empty), order.end()); };
    if (b > 0 && !last) drop([&](int i) { return block.length(i) == 0; });  // nothing to continue here
    if (op.kind == OpKind::kReduction) drop([&](int i) { return m.row_ptr[i + 1] == m.row_ptr[i]; });  // nothing to add

    auto place = [&](int k, ptrdiff_t byte) { out.places[m.entry[k]] = {static_cast<uint32_t>(b), static_cast<uint32_t>(byte)}; };
    Stream<T> stream;
    if (dense_rows > 0) stream = dense_stream<T>(block, dense_rows, source_stride, place);
    if (!stream.dense) stream = sparse_stream<T>(block, R, source_stride, place);
    const int32_t groups = static_cast<int32_t>(stream.rows.size()) / R;
    out.blocks.push_back({stream.steps.get(), stream.counts.data(), stream.rows.data(), groups, stream.dense});
    out.streams.push_back(std::move(stream.steps));
    out.counts.push_back(std::move(stream.counts));
    out.rows.push_back(std::move(stream.rows));
  }
  if (!matrix.dynamic()) set_weights(out, out.streams, matrix.values.data());
  if (matrix.dynamic()) out.dynamic = dynamic_ops++;
  return out;
}

}  // namespace

template <class T>
void validate(const Program<T>& p) {
  const int n_buffers = static_cast<int>(p.buffers.size());
  int64_t rows = 0;
  for (const Buffer& b : p.buffers) {
    if (b.rows < 0 || b.slots < 1 || b.slots > 3) fail("a buffer needs rows >= 0 and one to three slots");
    rows += (int64_t(b.rows) + 1) * b.slots;
  }
  if (rows > (int64_t(1) << 31) / 512) fail("the layers are too wide for 32-bit offsets");
  auto check_buffer = [&](int id, const char* name, bool optional) {
    if ((id < 0 && !optional) || id >= n_buffers) fail(std::string("no ") + name + " buffer");
    if (id >= 0 && p.buffers[id].rows != (std::string(name) == "ones" ? 1 : p.dim)) fail(std::string("the ") + name + " buffer has the wrong size");
  };
  check_buffer(p.input, "input", false);
  check_buffer(p.output, "output", false);
  check_buffer(p.noise, "noise", true);
  check_buffer(p.ones, "ones", true);
  for (int id : {p.input, p.noise, p.ones})  // whole rows are copied into these
    if (!p.adjoint() && id >= 0 && p.buffers[id].slots != 1) fail("the input, noise and ones buffers have one slot");
  for (size_t i = 0; i < p.modulations.size(); ++i) {
    const Modulation<T>& m = p.modulations[i];
    const size_t n = static_cast<size_t>(m.n);
    auto fits = [&](const std::vector<T>& v, bool optional) { return v.size() == n || (optional && v.empty()); };
    if (!fits(m.bias, false) || !fits(m.gate_slope, true) || m.gate_slope.size() != m.gate_offset.size() ||
        !fits(m.shift_slope, true) || m.shift_slope.size() != m.shift_offset.size())
      fail("modulation " + std::to_string(i) + ": arrays of different lengths");
    if (m.external_gate >= p.externals || m.external_shift >= p.externals) fail("modulation " + std::to_string(i) + ": no such external");
  }
  for (size_t i = 0; i < p.matrices.size(); ++i) validate_matrix(p.matrices[i], p, "matrix " + std::to_string(i));
  for (size_t i = 0; i < p.prologue.size(); ++i) {
    validate_op(p.prologue[i], p, "prologue operation " + std::to_string(i));
    if (p.prologue[i].kind != OpKind::kProduct || p.matrices[p.prologue[i].matrix].dynamic())
      fail("the prologue holds products of constant matrices only");
  }
  for (size_t i = 0; i < p.body.size(); ++i) validate_op(p.body[i], p, "operation " + std::to_string(i));
  if (!p.adjoint()) return;
  check_buffer(p.cotangent, "cotangent", false);
  check_buffer(p.state_cotangent, "state cotangent", false);
  if (p.divergence && (p.trace_cotangent < 0 || p.trace_cotangent >= n_buffers || p.buffers[p.trace_cotangent].rows != 1))
    fail("the trace's cotangent needs a buffer of one row");
  if (!p.prologue.empty() || p.externals > 0) fail("an adjoint has neither a prologue nor functions of time that live outside");
  for (size_t i = 0; i < p.keep.size(); ++i) validate_op(p.keep[i], p, "keep operation " + std::to_string(i));
  for (size_t i = 0; i < p.reverse.size(); ++i) validate_op(p.reverse[i], p, "reverse operation " + std::to_string(i));
  std::vector<int> taken(p.sums.size(), 0);
  for (const Op& op : p.reverse)
    if (op.kind == OpKind::kGradient && taken[op.sum]++) fail("two gradients add to one sum");
  auto check_sum = [&](int sum, int size, bool each_stage, const std::string& name) {
    if (sum < 0) return;
    if (sum >= static_cast<int>(p.sums.size()) || p.sums[sum].size != size || (size > 0 && p.sums[sum].each_stage != each_stage)) fail(name + ": its sum does not fit");
  };
  for (size_t i = 0; i < p.matrices.size(); ++i) check_sum(p.matrices[i].sum, p.matrices[i].nnz(), p.matrices[i].dynamic(), "matrix " + std::to_string(i));
  for (size_t i = 0; i < p.modulations.size(); ++i) {
    const Modulation<T>& m = p.modulations[i];
    check_sum(m.shift_sum, m.n, m.dynamic(), "modulation " + std::to_string(i));
    check_sum(m.gate_sum, m.n, true, "modulation " + std::to_string(i));
    if (m.shift_sum >= 0 && !m.gate_slope.empty() && m.gate_sum < 0) fail("modulation " + std::to_string(i) + ": a gate needs a sum of its own");
  }
}

template <class T>
std::unique_ptr<Packed<T>> pack(const Program<T>& program, const Kernels<T>& kernels, int width_index) {
  auto packed = std::make_unique<Packed<T>>();
  packed->width_index = width_index;
  packed->width = kernels.lanes * kernels.vectors[width_index];
  ptrdiff_t offset = 0;
  for (const Buffer& b : program.buffers) {
    packed->buffer_offset.push_back(offset);
    // one row to spare, where padded rows leave their sums, and an odd number of lines so that equal rows of two buffers do not collide
    offset += (b.rows + 1) * packed->row_bytes(b) + 64;
    offset = (offset + 63) / 64 * 64;
  }
  packed->reduce_offset = offset;
  packed->workspace_bytes = static_cast<size_t>(offset) + static_cast<size_t>(packed->width) * sizeof(T);
  if (offset > (ptrdiff_t(1) << 32) - 1) fail("the layers are too wide for 32-bit offsets");
  for (const Op& op : program.prologue) packed->prologue.push_back(pack_op(op, program, *packed, kernels, packed->dynamic_ops));
  for (const Op& op : program.body) packed->body.push_back(pack_op(op, program, *packed, kernels, packed->dynamic_ops));
  for (const Op& op : program.keep) packed->keep.push_back(pack_op(op, program, *packed, kernels, packed->dynamic_ops));
  for (const Op& op : program.reverse) packed->reverse.push_back(pack_op(op, program, *packed, kernels, packed->dynamic_ops));
  return packed;
}

template <class T>
void reweave(const Program<T>& program, const Packed<T>& packed, int matrix) {
  const std::vector<T>& values = program.matrices[matrix].values;
  packed.for_each_op([&](const PackedOp<T>& op) {
    if (op.dynamic < 0 && op.op->matrix == matrix) set_weights(op, op.streams, values.data());  // gradients have no places
  });
}

template <class T>
void set_values(Program<T>& program, int matrix, std::vector<T> values) {
  if (matrix < 0 || matrix >= static_cast<int>(program.matrices.size())) fail("no such matrix");
  Matrix<T>& m = program.matrices[matrix];
  std::vector<T>& own = m.gated ? m.path_constant : m.values;
  if (m.external >= 0 || values.size() != own.size()) fail("matrix " + std::to_string(matrix) + ": not as many values as it has");
  own = std::move(values);
}

template <class T>
void set_modulation(Program<T>& program, int modulation, std::vector<T> bias, std::vector<T> gate_slope, std::vector<T> gate_offset,
                    std::vector<T> shift_slope, std::vector<T> shift_offset) {
  if (modulation < 0 || modulation >= static_cast<int>(program.modulations.size())) fail("no such modulation");
  Modulation<T>& m = program.modulations[modulation];
  auto set = [&](std::vector<T>& own, std::vector<T>& values) {
    if (values.size() != own.size()) fail("modulation " + std::to_string(modulation) + ": not as many numbers as it has");
    own = std::move(values);
  };
  set(m.bias, bias), set(m.gate_slope, gate_slope), set(m.gate_offset, gate_offset);
  set(m.shift_slope, shift_slope), set(m.shift_offset, shift_offset);
}

template <class T>
Stage<T>::Stage(const Program<T>& program, const Packed<T>& packed, const Kernels<T>& kernels)
    : program_(&program), packed_(&packed), kernels_(&kernels) {
  for (const Modulation<T>& m : program.modulations) {
    scale_.emplace_back(m.n, T(0));
    shift_.emplace_back(m.n, T(0));
  }
  for (const Matrix<T>& m : program.matrices) {
    coefficients_.emplace_back();
    if (m.rows == 1) {
      if (m.dynamic()) coefficients_.back().assign(m.nnz(), T(0));
      else coefficients_.back() = m.values;
    }
  }
  streams_.resize(packed.dynamic_ops);
  blocks_.resize(packed.dynamic_ops);
  packed.for_each_op([&](const PackedOp<T>& op) {
    if (op.dynamic < 0) return;
    for (size_t b = 0; b < op.streams.size(); ++b) {
      streams_[op.dynamic].emplace_back(op.streams[b].size());
      std::copy_n(op.streams[b].get(), op.streams[b].size(), streams_[op.dynamic].back().get());
      PackedBlock<T> block = op.blocks[b];
      block.steps = streams_[op.dynamic].back().get();
      blocks_[op.dynamic].push_back(block);
    }
  });
}

template <class T>
void Stage<T>::modulate(T t, const std::vector<std::vector<T>>* answers) {
  for (size_t i = 0; i < program_->modulations.size(); ++i) {
    const Modulation<T>& m = program_->modulations[i];
    if (fresh_ && !m.dynamic()) continue;
    std::vector<T>&scale = scale_[i], &shift = shift_[i];
    if (m.external_gate >= 0) std::copy_n((*answers)[m.external_gate].begin(), m.n, scale.begin());
    else if (!m.gate_slope.empty()) kernels_->sigmoid(m.gate_slope.data(), m.gate_offset.data(), t, m.n, scale.data());
    else std::fill_n(scale.begin(), m.n, T(1));
    // The cotangent of a shift is found as that of the gated sum over the gate, so an adjoint's gate must not vanish.
    if (program_->adjoint() && !m.gate_slope.empty())
      for (T& s : scale) s = std::max(s, sizeof(T) == 4 ? T(1e-30) : T(1e-290));
    for (int j = 0; j < m.n; ++j) {
      T c = T(0);
      if (m.external_shift >= 0) c = (*answers)[m.external_shift][j];
      else if (!m.shift_slope.empty()) c = m.shift_slope[j] * t + m.shift_offset[j];
      shift[j] = scale[j] * m.bias[j] + c;
    }
  }
  fresh_ = true;
}

// Puts the values of a matrix wherever they are used.
template <class T>
void Stage<T>::weave(int matrix, const T* values) {
  const int nnz = program_->matrices[matrix].nnz();
  if (!coefficients_[matrix].empty()) std::copy_n(values, nnz, coefficients_[matrix].begin());
  packed_->for_each_op([&](const PackedOp<T>& op) {
    if (op.dynamic >= 0 && op.op->matrix == matrix) set_weights(op, streams_[op.dynamic], values);
  });
}

template <class T>
void Stage<T>::refresh(std::vector<Stage<T>>& stages, const std::vector<T>& times,
                       const std::vector<std::vector<std::vector<T>>>& answers) {
  const int n = static_cast<int>(times.size());
  for (int s = 0; s < n; ++s) stages[s].modulate(times[s], answers.empty() ? nullptr : &answers[s]);
  const Program<T>& program = *stages[0].program_;
  for (size_t i = 0; i < program.matrices.size(); ++i) {
    const Matrix<T>& m = program.matrices[i];
    const int matrix = static_cast<int>(i);
    if (m.external >= 0) {
      for (int s = 0; s < n; ++s) stages[s].weave(matrix, answers[s][m.external].data());
    } else if (m.gated) {
      // Paths are many and the stages of a step few: the stages are the lanes.
      constexpr int kLanes = 8;
      const int gates = program.modulations[m.gate_modulation].n;
      std::vector<T> gate(size_t(gates) * kLanes, T(0)), values(size_t(m.nnz()) * kLanes, T(0));
      for (int first = 0; first < n; first += kLanes) {
        const int lanes = std::min(kLanes, n - first);
        for (int s = 0; s < lanes; ++s)
          for (int g = 0; g < gates; ++g) gate[size_t(g) * kLanes + s] = stages[first + s].scale_[m.gate_modulation][g];
        const size_t paths = m.path_entry.size();
        for (size_t p = 0; p < paths;) {
          const int32_t entry = m.path_entry[p];
          T sum[kLanes] = {};
          for (; p < paths && m.path_entry[p] == entry; ++p) {
            const T constant = m.path_constant[p];
            const T* g = gate.data() + size_t(m.path_gate[p]) * kLanes;
            for (int s = 0; s < kLanes; ++s) sum[s] += constant * g[s];
          }
          for (int s = 0; s < lanes; ++s) values[size_t(s) * m.nnz() + entry] = sum[s];
        }
        for (int s = 0; s < lanes; ++s) stages[first + s].weave(matrix, values.data() + size_t(s) * m.nnz());
      }
    }
  }
}

template <class T>
void Stage<T>::run(const std::vector<PackedOp<T>>& ops, char* workspace, T* lasting, T* each_stage, size_t first, size_t count) const {
  for (size_t i = first; i < ops.size() && i - first < count; ++i) {
    const PackedOp<T>& op = ops[i];
    if (op.gradient) {
      T* const sums = (program_->sums[op.op->sum].each_stage ? each_stage : lasting) + op.sums;
      const int32_t dense_blocks = static_cast<int32_t>(op.dense.size() / gradient_block_offsets(kernels_->lanes));
      op.gradient({workspace, op.dense.data(), dense_blocks, op.runs.data(), op.right.data(),
                   static_cast<int32_t>(op.runs_of_batch.size()), op.runs_of_batch.data(), sums});
      continue;
    }
    RowArgs<T> args = op.args;
    const std::vector<PackedBlock<T>>& blocks = op.dynamic < 0 ? op.blocks : blocks_[op.dynamic];
    const Matrix<T>& matrix = program_->matrices[op.op->matrix];
    args.matrix = {blocks.data(), static_cast<int32_t>(blocks.size()), op.op->transposed ? matrix.cols : matrix.rows};
    auto at = [workspace](ptrdiff_t offset) { return offset < 0 ? nullptr : workspace + offset; };
    args.source = at(op.source);
    args.target = at(op.target);
    args.seed = at(op.seed);
    args.weight = at(op.weight);
    args.factor = at(op.factor);
    args.factor2 = at(op.factor2);
    args.addend = at(op.addend);
    args.kept = at(op.kept);
    args.slope_cotangent = at(op.slope_cotangent);
    args.value = at(op.value);
    args.reduce = reinterpret_cast<T*>(workspace + packed_->reduce_offset);
    if (op.op->modulation >= 0) {
      args.scale = scale_[op.op->modulation].data();
      args.shift = shift_[op.op->modulation].data();
    }
    args.coefficient = op.op->coefficient_matrix < 0 ? nullptr : coefficients_[op.op->coefficient_matrix].data();
    op.kernel(args);
  }
}

template void validate(const Program<float>&);
template void validate(const Program<double>&);
template std::unique_ptr<Packed<float>> pack(const Program<float>&, const Kernels<float>&, int);
template std::unique_ptr<Packed<double>> pack(const Program<double>&, const Kernels<double>&, int);
template void reweave(const Program<float>&, const Packed<float>&, int);
template void reweave(const Program<double>&, const Packed<double>&, int);
#define X(T)                                                   \
  template void set_values(Program<T>&, int, std::vector<T>); \
  template void set_modulation(Program<T>&, int, std::vector<T>, std::vector<T>, std::vector<T>, std::vector<T>, std::vector<T>);
X(float) X(double)
#undef X
template class Stage<float>;
template class Stage<double>;

}  // namespace sparseflow
