#include "pack.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "../fork.h"

namespace sparseflow {
namespace {

constexpr int64_t kWorkToPack = 64;  // an entry takes as long as so many multiply-adds

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
    return uint32_t(packed.buffer_offset[o.buffer] + o.slot * slot_bytes + (o.row + row) * packed.row_bytes(program.buffers[o.buffer]));
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
      worked(kWorkToPack * (all.entries + height));
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
    worked(kWorkToPack * (out.counts[g] + 1) * R);
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
    worked(kWorkToPack * (all.entries + R));
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
    worked(kWorkToPack * (out.counts[g] + 1) * R);
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
  const int lanes = packed.width * (op.tangent() ? 2 : 1);
  out.work = (int64_t(program.matrices[op.matrix].nnz()) + 4 * int64_t(program.matrices[op.matrix].rows)) * lanes;
  const Matrix<T>& matrix = program.matrices[op.matrix];
  if (op.kind == OpKind::kGradient) {
    if (matrix.window.present()) pack_planes(out, op, program, packed, kernels);
    else pack_gradient(out, op, program, packed, kernels);
    return out;
  }
  const int w = packed.width_index;
  const bool tangent = op.tangent();
  const ptrdiff_t slot_bytes = ptrdiff_t(packed.width) * ptrdiff_t(sizeof(T));
  auto address = [&](const Operand& o) {
    return o.buffer < 0 ? ptrdiff_t(-1) : packed.buffer_offset[o.buffer] + o.row * packed.row_bytes(program.buffers[o.buffer]) + o.slot * slot_bytes;
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
  const bool planes = matrix.window.present();
  switch (op.kind) {
    case OpKind::kAffine: out.kernel = (tangent ? kernels.affine_tangent : kernels.affine)[planes][activation][w]; break;
    case OpKind::kProduct: out.kernel = kernels.product[planes][w]; break;
    case OpKind::kReduction: out.kernel = kernels.reduction[w]; break;
    case OpKind::kKeep: out.kernel = kernels.keep[op.carries][activation][w]; break;
    case OpKind::kPull: out.kernel = kernels.pull[op.slope_from][op.carries][w]; break;
    case OpKind::kGradient: case OpKind::kPointwise: break;
  }
  if (out.kernel == nullptr) fail("this tile width has no adjoint kernels");

  const ptrdiff_t source_stride = args.source_stride = stride(op.source);
  if (planes) {
    pack_planes(out, op, program, packed, kernels);
    if (!matrix.dynamic()) set_weights(out, out.streams, matrix.values.data());
    return out;
  }
  const Entries m = entries_of(matrix, op.transposed);
  const int R = tangent ? kernels.rows_in_flight_tangent[w] : kernels.rows_in_flight[w];
  const int dense_rows = tangent ? kernels.dense_rows_tangent[w] : kernels.dense_rows[w];
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

template <class T>
void pack_list(const std::vector<Op>& ops, const Program<T>& program, Packed<T>& packed, const Kernels<T>& kernels, std::vector<PackedOp<T>>& out) {
  std::vector<std::vector<int>> of_matrix(program.matrices.size());  // operations packed so far
  out.reserve(ops.size());
  for (const Op& op : ops) {
    if (op.kind == OpKind::kPointwise) {
      out.push_back(pack_pointwise(op, program, packed));
      continue;
    }
    std::vector<int>& known = of_matrix[op.matrix];
    const auto first = std::find_if(known.begin(), known.end(), [&](int i) { return ops[i].repeats(op); });
    if (first != known.end()) {
      out.emplace_back();
      out.back().op = &op;
      out.back().repeats = *first;
      continue;
    }
    known.push_back(static_cast<int>(out.size()));
    out.push_back(pack_op(op, program, packed, kernels, packed.dynamic_ops));
  }
}

}  // namespace

template <class T>
std::unique_ptr<Packed<T>> pack(const Program<T>& program, const Kernels<T>& kernels, int width_index) {
  auto packed = std::make_unique<Packed<T>>();
  packed->width_index = width_index;
  packed->width = kernels.lanes * kernels.vectors[width_index];
  ptrdiff_t offset = 0;
  for (const Buffer& b : program.buffers) {
    packed->buffer_offset.push_back(offset);
    // one row to spare, where padded rows find sums to continue, and an odd number of lines so that equal rows of two buffers do not collide
    offset += (b.rows + 1) * packed->row_bytes(b) + 64;
    offset = (offset + 63) / 64 * 64;
  }
  packed->reduce_offset = offset;
  packed->scratch_offset = (offset + ptrdiff_t(packed->width) * ptrdiff_t(sizeof(T)) + 63) / 64 * 64;
  if (offset > (ptrdiff_t(1) << 32) - 1) fail("the layers are too wide for 32-bit offsets");
  pack_list(program.prologue, program, *packed, kernels, packed->prologue);
  pack_list(program.body, program, *packed, kernels, packed->body);
  pack_list(program.keep, program, *packed, kernels, packed->keep);
  pack_list(program.reverse, program, *packed, kernels, packed->reverse);
  packed->workspace_bytes = static_cast<size_t>(packed->scratch_offset + packed->scratch_bytes);
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
  const NoFork whole;
  own = std::move(values);
}

template <class T>
void set_modulation(Program<T>& program, int modulation, std::vector<T> bias, std::vector<T> gate_slope, std::vector<T> gate_offset,
                    std::vector<T> shift_slope, std::vector<T> shift_offset) {
  if (modulation < 0 || modulation >= static_cast<int>(program.modulations.size())) fail("no such modulation");
  Modulation<T>& m = program.modulations[modulation];
  auto set = [&](std::vector<T>& own, std::vector<T>& values) {
    if (values.size() != own.size()) fail("modulation " + std::to_string(modulation) + ": not as many numbers as it has");
    const NoFork whole;
    own = std::move(values);
  };
  set(m.bias, bias), set(m.gate_slope, gate_slope), set(m.gate_offset, gate_offset);
  set(m.shift_slope, shift_slope), set(m.shift_offset, shift_offset);
}

template <class T>
void set_vector(Program<T>& program, int vector, std::vector<T> values) {
  if (vector < 0 || vector >= static_cast<int>(program.vectors.size())) fail("no such row vector");
  RowVector<T>& v = program.vectors[vector];
  if (v.timed() || values.size() != v.values.size()) fail("row vector " + std::to_string(vector) + ": not as many values as it has");
  const NoFork whole;
  v.values = std::move(values);
}

template <class T>
Stage<T>::Stage(const Program<T>& program, const Packed<T>& packed, const Kernels<T>& kernels)
    : program_(&program), packed_(&packed), kernels_(&kernels) {
  for (const Modulation<T>& m : program.modulations) {
    scale_.emplace_back(m.n, T(0));
    shift_.emplace_back(m.n, T(0));
  }
  time_answer_.assign(program.time_rows, T(0));
  for (const RowVector<T>& v : program.vectors) vectors_.push_back(v.timed() ? time_answer_.data() + v.time_row : v.values.data());
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
      worked(int64_t(op.streams[b].size()));
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
    std::vector<T>&scale = scale_[i], &shift = shift_[i];
    if (m.of_vectors()) {
      if (m.scale_vector >= 0) std::copy_n(vectors_[m.scale_vector], m.n, scale.begin());
      else std::fill_n(scale.begin(), m.n, T(1));
      if (m.shift_vector >= 0) std::copy_n(vectors_[m.shift_vector], m.n, shift.begin());
      continue;
    }
    if (fresh_ && !m.dynamic()) continue;
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
void Stage<T>::refresh(std::vector<Stage<T>>& stages, const std::vector<T>& times, const std::vector<std::vector<std::vector<T>>>& answers,
                       const std::vector<T>& time_answers) {
  const int n = static_cast<int>(times.size());
  const Program<T>& program = *stages[0].program_;
  for (int s = 0; s < n; ++s) {
    if (program.time_rows > 0) std::copy_n(time_answers.data() + size_t(s) * program.time_rows, program.time_rows, stages[s].time_answer_.begin());
    stages[s].modulate(times[s], answers.empty() ? nullptr : &answers[s]);
  }
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
        for (size_t p = 0, looked = 0; p < paths;) {
          if (p - looked > size_t(kWorkPerLook) / kLanes) look(), looked = p;
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
  int64_t work = 0;
  for (size_t i = first; i < ops.size() && i - first < count; ++i) {
    if (work > kWorkPerLook) worked(std::exchange(work, 0));
    const PackedOp<T>& op = ops[i].repeats < 0 ? ops[i] : ops[ops[i].repeats];
    work += op.work;
    if (op.op->kind == OpKind::kPointwise) {
      run_pointwise(op, *packed_, *kernels_, vectors_, workspace);
      continue;
    }
    if (op.plane_gradient) {
      run_plane_gradient(op, *packed_, workspace, (program_->sums[op.op->sum].each_stage ? each_stage : lasting) + op.sums);
      continue;
    }
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
    if (matrix.window.present()) args.planes = &op.planes, args.scratch = workspace + packed_->scratch_offset;
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
  worked(work);
}

template std::unique_ptr<Packed<float>> pack(const Program<float>&, const Kernels<float>&, int);
template std::unique_ptr<Packed<double>> pack(const Program<double>&, const Kernels<double>&, int);
template void reweave(const Program<float>&, const Packed<float>&, int);
template void reweave(const Program<double>&, const Packed<double>&, int);
#define X(T)                                                   \
  template void set_values(Program<T>&, int, std::vector<T>); \
  template void set_vector(Program<T>&, int, std::vector<T>); \
  template void set_modulation(Program<T>&, int, std::vector<T>, std::vector<T>, std::vector<T>, std::vector<T>, std::vector<T>);
X(float) X(double)
#undef X
template class Stage<float>;
template class Stage<double>;

}  // namespace sparseflow
