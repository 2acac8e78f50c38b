#include "linear.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "samples.h"

namespace sparseflow {
namespace {

// One way or the other between `batch`, [samples][features], and `rows`, [features][width]. The user's memory is gone through
// in whole lines, a few samples at a time (lines of many samples may all compete for one place in a cache), and those of
// the tile are used up while they are in the first-level cache.
template <class T, class Block, class One>
inline void panels(int samples, int features, Block block, One one) {
  constexpr int L = Small<T>::kLanes, kLine = 64 / int(sizeof(T)), kPanel = 4 * kLine;
  for (int s0 = 0; s0 < samples; s0 += kLine) {
    const int s1 = std::min(samples, s0 + kLine);
    for (int f0 = 0; f0 < features; f0 += kPanel) {
      const int f1 = std::min(features, f0 + kPanel);
      int s = s0;
      for (; s + L <= s1; s += L) {
        int f = f0;
        for (; f + L <= f1; f += L) block(s, f);
        for (; f < f1; ++f)
          for (int i = 0; i < L; ++i) one(s + i, f);
      }
      for (; s < s1; ++s)
        for (int f = f0; f < f1; ++f) one(s, f);
    }
  }
}

// Lanes beyond the batch are zero: they add nothing to a gradient.
template <class T>
void load_rows(const T* x, int features, int64_t first, int count, int width, T* rows) {
  using S = Small<T>;
  const T* const batch = x + first * features;
  panels<T>(
      count, features,
      [=](int s, int f) {
        typename S::V v[S::kLanes];
        for (int i = 0; i < S::kLanes; ++i) __builtin_memcpy(v + i, batch + ptrdiff_t(s + i) * features + f, sizeof v[0]);
        S::transpose(v);
        for (int i = 0; i < S::kLanes; ++i) __builtin_memcpy(rows + ptrdiff_t(f + i) * width + s, v + i, sizeof v[0]);
      },
      [=](int s, int f) { rows[ptrdiff_t(f) * width + s] = batch[ptrdiff_t(s) * features + f]; });
  if (count < width)
    for (int f = 0; f < features; ++f) std::fill(rows + ptrdiff_t(f) * width + count, rows + ptrdiff_t(f + 1) * width, T(0));
}

template <class T, bool Bias>
void store_rows(const T* rows, int features, int64_t first, int count, int width, const T* bias, T* out) {
  using S = Small<T>;
  T* const batch = out + first * features;
  panels<T>(
      count, features,
      [=](int s, int f) {
        typename S::V v[S::kLanes];
        for (int i = 0; i < S::kLanes; ++i) __builtin_memcpy(v + i, rows + ptrdiff_t(f + i) * width + s, sizeof v[0]);
        S::transpose(v);
        if constexpr (Bias) {
          typename S::V b;
          __builtin_memcpy(&b, bias + f, sizeof b);
          for (int i = 0; i < S::kLanes; ++i) v[i] += b;
        }
        for (int i = 0; i < S::kLanes; ++i) __builtin_memcpy(batch + ptrdiff_t(s + i) * features + f, v + i, sizeof v[0]);
      },
      [=](int s, int f) {
        T value = rows[ptrdiff_t(f) * width + s];
        if constexpr (Bias) value += bias[f];
        batch[ptrdiff_t(s) * features + f] = value;
      });
}

constexpr size_t kPackings = 2;                   // kept for each operation: a batch size, and the last batch of an epoch
constexpr int kPiece = 16384;                     // values that a thread weaves in at a time
constexpr size_t kTileBytes = size_t(512) << 10;  // of a gradient: half a second-level cache
constexpr size_t kTilesBytes = size_t(64) << 20;  // of a gradient's tiles at the same time

// The tiles of a gradient; the kernels for values and tangents side by side serve twice the samples.
struct GradientTile {
  int width_index;
  bool twice;
};
constexpr GradientTile kGradientTiles[] = {{0, false}, {1, false}, {3, false}, {3, true}};

}  // namespace

template <class T>
SparseLinear<T>::SparseLinear(int rows, int cols, std::vector<int32_t> row_ptr, std::vector<int32_t> col, const Kernels<T>& kernels)
    : kernels_(kernels) {
  matrix_.rows = rows;
  matrix_.cols = cols;
  matrix_.row_ptr = std::move(row_ptr);
  matrix_.col = std::move(col);
  matrix_.values.resize(matrix_.col.size());
  validate(product_program(false));
}

// Buffer 0 has the matrix's columns, 1 its rows.
template <class T>
Program<T> SparseLinear<T>::between_buffers(int slots) const {
  Program<T> p;
  p.buffers = {{matrix_.cols, slots}, {matrix_.rows, slots}};
  p.dim = matrix_.cols;
  p.input = p.output = 0;
  return p;
}

template <class T>
Program<T> SparseLinear<T>::product_program(bool transposed) const {
  Program<T> p = between_buffers(1);
  p.matrices.push_back(matrix_);
  Op op;
  op.kind = OpKind::kProduct;
  op.matrix = 0;
  op.transposed = transposed;
  op.source = {transposed, 0};
  op.target = {!transposed, 0};
  p.body.push_back(op);
  return p;
}

// The rows in slabs of about as many entries, each with a sum of its own.
template <class T>
Program<T> SparseLinear<T>::gradient_program(bool twice, int slabs) const {
  Program<T> p = between_buffers(twice ? 2 : 1);
  p.cotangent = p.state_cotangent = 0;
  int row = 0;
  for (int slab = 0; slab < slabs; ++slab) {
    const int first = row, last_entry = static_cast<int>(int64_t(nnz()) * (slab + 1) / slabs);
    while (row < matrix_.rows && (slab + 1 == slabs || matrix_.row_ptr[row + 1] <= last_entry)) ++row;
    const int begin = matrix_.row_ptr[first], end = matrix_.row_ptr[row];
    Matrix<T> part;
    part.rows = matrix_.rows, part.cols = matrix_.cols;
    for (int32_t pointer : matrix_.row_ptr) part.row_ptr.push_back(std::clamp(pointer, begin, end) - begin);
    part.col.assign(matrix_.col.begin() + begin, matrix_.col.begin() + end);
    part.values.resize(part.col.size());
    p.matrices.push_back(std::move(part));
    p.sums.push_back({end - begin, false});
    Op op;
    op.kind = OpKind::kGradient;
    op.matrix = op.sum = slab;
    op.source = {0, 0};
    op.factor = {1, 0};
    op.carries = twice;
    p.reverse.push_back(op);
  }
  return p;
}

template <class T>
char* SparseLinear<T>::workspace(int worker, size_t bytes) {
  Aligned<char>& memory = workspaces_[worker];
  if (memory.size() < bytes) memory = Aligned<char>(bytes);
  return memory.get();
}

// The width by which the batch is done soonest; no bit depends on it. A vector more costs a multiply-add per entry, whose
// weight and offset are loaded once for all (measured: 0.6 to 0.75 of a multiply-add). Six vectors are no quicker than four
// by the sample, but for a batch that they just hold.
template <class T>
int SparseLinear<T>::product_width(int64_t batch, int threads) {
  if (forced_ >= 0) return forced_;
  int best = 0;
  double least = 0;
  for (int w = 0; w < Kernels<T>::kWidths; ++w) {
    const int vectors = kernels_.vectors[w], width = kernels_.lanes * vectors;
    const int64_t tiles = (batch + width - 1) / width;
    const int at_hand = threads_at_hand(multiply_.known() ? multiply_.seconds() * work(width) * double(tiles) : 0, 0, static_cast<int>(std::min<int64_t>(threads, tiles)));
    const double cost = double((tiles + at_hand - 1) / at_hand) * (0.7 + vectors) * (vectors > 4 ? 1.15 : 1.0);
    if (w == 0 || cost < least) least = cost, best = w;
  }
  return best;
}

// It follows from the batch and the matrix alone, as the order of the sums follows from it.
template <class T>
int SparseLinear<T>::gradient_kind(int64_t batch) const {
  int best = 0;
  double least = 0;
  for (int kind = 0; kind < int(std::size(kGradientTiles)); ++kind) {
    const int width = gradient_width(kind);
    if (kind > 0 && kGradientTiles[kind].twice && (size_t(matrix_.rows) + matrix_.cols) * width * sizeof(T) > kTileBytes) break;
    const double cost = double((batch + width - 1) / width) * (3.0 + double(width) / kernels_.lanes);  // three: adding up lanes
    if (kind == 0 || cost < least) least = cost, best = kind;
  }
  return best;
}

template <class T>
int SparseLinear<T>::gradient_width(int kind) const {
  return kernels_.lanes * kernels_.vectors[kGradientTiles[kind].width_index] * (kGradientTiles[kind].twice ? 2 : 1);
}

template <class T>
typename SparseLinear<T>::Packing& SparseLinear<T>::product(bool transposed, int width_index) {
  return recent(products_, Product{transposed, width_index}, 2 * kPackings, [&] {
    auto made = std::make_unique<Packing>();
    made->program = product_program(transposed);
    made->packed = pack(made->program, kernels_, width_index);
    return made;
  });
}

template <class T>
void SparseLinear<T>::multiply(bool transposed, const T* values, const T* x, int64_t batch, const T* bias, int threads, T* out) {
  if (batch == 0) return;
  const Exclusive::Hold held(one_caller_);
  threads = std::max(1, threads);
  if (nnz() > 0 && (values_.empty() || std::memcmp(values_.data(), values, nnz() * sizeof(T)) != 0)) {
    values_.assign(values, values + nnz());
    ++generation_;
  }
  Packing& packing = product(transposed, product_width(batch, threads));
  const Packed<T>& packed = *packing.packed;
  const PackedOp<T>& op = packed.body[0];
  if (packing.generation != generation_) {
    const int pieces = static_cast<int>((op.places.size() + kPiece - 1) / kPiece);
    parallel_for(pieces, threads, Work{traffic_, kPiece}, [&](int piece, int) {
      const size_t begin = size_t(piece) * kPiece, end = std::min(op.places.size(), begin + kPiece);
      for (size_t e = begin; e < end; ++e) *reinterpret_cast<T*>(op.streams[op.places[e].block].get() + op.places[e].byte) = values_[e];
    });
    packing.generation = generation_;
  }
  const int in = transposed ? matrix_.rows : matrix_.cols, rows = transposed ? matrix_.cols : matrix_.rows, width = packed.width;
  const int tiles = static_cast<int>((batch + width - 1) / width), workers = std::min(threads, tiles);
  if (static_cast<int>(workspaces_.size()) < workers) workspaces_.resize(workers);
  parallel_for(tiles, workers, Work{multiply_, work(width)}, [&](int tile, int worker) {
    char* const ws = workspace(worker, packed.workspace_bytes);
    const int64_t first = int64_t(tile) * width;
    const int count = static_cast<int>(std::min<int64_t>(width, batch - first));
    load_rows(x, in, first, count, width, reinterpret_cast<T*>(ws + op.source));
    RowArgs<T> args = op.args;
    args.matrix = {op.blocks.data(), static_cast<int32_t>(op.blocks.size()), rows};
    args.source = ws + op.source;
    args.target = ws + op.target;
    op.kernel(args);
    worked(op.work + int64_t(in + rows) * width);
    (bias ? store_rows<T, true> : store_rows<T, false>)(reinterpret_cast<const T*>(ws + op.target), rows, first, count, width, bias, out);
  });
}

template <class T>
typename SparseLinear<T>::Packing& SparseLinear<T>::gradient_of(int kind, int slabs) {
  return recent(gradients_, Gradient{kind, slabs}, kPackings, [&] {
    auto made = std::make_unique<Packing>();
    made->program = gradient_program(kGradientTiles[kind].twice, slabs);
    made->packed = pack(made->program, kernels_, kGradientTiles[kind].width_index);
    return made;
  });
}

// As many tiles at a time as there are threads, which turn one each; then every thread takes slabs, over these tiles in
// their order.
template <class T>
void SparseLinear<T>::gradient(const T* left, const T* right, int64_t batch, int threads, T* sums) {
  std::fill_n(sums, nnz(), T(0));
  if (batch == 0 || nnz() == 0) return;
  const Exclusive::Hold held(one_caller_);
  threads = std::max(1, threads);
  const int kind = gradient_kind(batch), width = gradient_width(kind), tiles = static_cast<int>((batch + width - 1) / width);
  const int slabs = threads == 1 ? 1 : std::clamp(2 * threads, 1, std::max(1, matrix_.rows / 8));
  const Packing& packing = gradient_of(kind, slabs);
  const Packed<T>& packed = *packing.packed;
  const size_t tile_bytes = (packed.workspace_bytes + 63) / 64 * 64;
  const int together = static_cast<int>(std::clamp<size_t>(kTilesBytes / tile_bytes, 1, std::min(threads, tiles)));
  if (workspaces_.empty()) workspaces_.resize(1);
  char* const ws = workspace(0, tile_bytes * together);
  if (totals_.size() < packed.lasting_sums) totals_ = Aligned<T>(packed.lasting_sums);
  std::fill_n(totals_.get(), packed.lasting_sums, T(0));
  for (int begin = 0; begin < tiles; begin += together) {
    const int end = std::min(tiles, begin + together);
    parallel_for(end - begin, threads, Work{traffic_, double(matrix_.rows + matrix_.cols) * width}, [&](int index, int) {
      const int64_t first = int64_t(begin + index) * width;
      const int count = static_cast<int>(std::min<int64_t>(width, batch - first));
      char* const tile = ws + tile_bytes * index;
      load_rows(right, matrix_.cols, first, count, width, reinterpret_cast<T*>(tile + packed.buffer_offset[0]));
      load_rows(left, matrix_.rows, first, count, width, reinterpret_cast<T*>(tile + packed.buffer_offset[1]));
    });
    parallel_for(slabs, threads, Work{gradient_, work(width) * (end - begin) / slabs}, [&](int slab, int) {
      const PackedOp<T>& op = packed.reverse[slab];
      const int32_t dense_blocks = static_cast<int32_t>(op.dense.size() / gradient_block_offsets(kernels_.lanes));
      for (int tile = 0; tile < end - begin; ++tile, worked(op.work))
        op.gradient({ws + tile_bytes * tile, op.dense.data(), dense_blocks, op.runs.data(), op.right.data(),
                     static_cast<int32_t>(op.runs_of_batch.size()), op.runs_of_batch.data(), totals_.get() + op.sums});
    });
  }
  for (const PackedOp<T>& op : packed.reverse) {
    for (size_t i = 0; i < op.entry.size(); ++i)
      if (op.entry[i] >= 0) sums[op.entry[i]] = totals_[op.sums + i];
    sums += packing.program.matrices[op.op->matrix].nnz();
  }
}

template <class T>
void SparseLinear<T>::force_width(int index) {
  if (index < -1 || index >= Kernels<T>::kWidths) throw std::invalid_argument("force_width: no such width: index is " + std::to_string(index));
  const Exclusive::Hold held(one_caller_);
  forced_ = index;
}

template class SparseLinear<float>;
template class SparseLinear<double>;

}  // namespace sparseflow
