#include "convolution.h"

#include <algorithm>
#include <cstring>

#include "samples.h"

namespace sparseflow {
namespace {

constexpr size_t kPackings = 6;                   // products, transposed ones and gradients, for two sizes of a batch
constexpr size_t kTileBytes = size_t(1) << 20;    // what a tile should take: a second-level cache
constexpr double kFarTile = 1.2;                  // a larger one is so much slower
constexpr double kTurn = 3.0;                     // multiply-adds that a number takes on its way into a tile or out of it
constexpr int kChunks = 16;                       // of the tiles of a gradient, each with sums of its own

int divided_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
int divided_down(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The same row of the next plane, which no prefetcher of the processor foresees for so many lanes.
template <class T, int Write>
inline void fetch(const T* row, int width) {
  for (int c = 0; c < width; c += 64 / int(sizeof(T))) __builtin_prefetch(row + c, Write);
  __builtin_prefetch(row + width - 1, Write);
}

}  // namespace

template <class T>
SparseConvolution<T>::SparseConvolution(int out, int in, std::vector<int32_t> row_ptr, std::vector<int32_t> col, const Window& window,
                                        const Kernels<T>& kernels)
    : kernels_(kernels) {
  auto rows_of = [](int planes, int area) {
    const int64_t rows = int64_t(planes) * area;
    if (rows > kMostRows) fail("planes of " + std::to_string(rows) + " pixels, more than 32-bit offsets reach");
    return static_cast<int>(rows);
  };
  matrix_.rows = rows_of(out, window.target_area());
  matrix_.cols = rows_of(in, window.source_area());
  matrix_.row_ptr = std::move(row_ptr);
  matrix_.col = std::move(col);
  matrix_.values.resize(matrix_.col.size());
  matrix_.window = window;
  if (!window.present()) fail("a convolution needs a window");
  Program<T> p;
  p.matrices = {matrix_};
  p.buffers = {{matrix_.cols, 1}, {matrix_.rows, 1}};
  p.dim = matrix_.cols, p.out = matrix_.rows;
  p.input = 0, p.output = 1;
  validate(p);
}

// A strip reads rows of its own alone, those outside of the image as zeros, so that it needs no padding above and below.
template <class T>
typename SparseConvolution<T>::Cut SparseConvolution<T>::cut(const Key& key) const {
  const Window& w = matrix_.window;
  const int s = w.stride[0], reach = (w.kernel[0] - 1) * w.dilation[0];
  const int out = matrix_.pattern_rows(), in = matrix_.cols / w.source_area();
  Cut c;
  c.window = w;
  if (key.what == What::kTransposed) {
    const int before = divided_down(w.padding[0] - reach, s);  // the first row of the strip reads this one of the cotangent first
    c.window.source[0] = key.rows;
    c.window.padding[0] = w.padding[0] - s * before;
    c.window.target[0] = (key.rows - 1 + c.window.padding[0]) / s + 1;
    c.strips = divided_up(w.source[0], key.rows);
    c.read = {out, w.target[0], w.target[1], before, key.rows / s, c.window.target[0]};
    c.other = {in, w.source[0], w.source[1], 0, key.rows, key.rows};
  } else {
    c.window.target[0] = key.rows;
    c.window.source[0] = (key.rows - 1) * s + reach + 1;
    c.window.padding[0] = 0;
    c.strips = divided_up(w.target[0], key.rows);
    c.read = {in, w.source[0], w.source[1], -w.padding[0], key.rows * s, c.window.source[0]};
    c.other = {out, w.target[0], w.target[1], 0, key.rows, key.rows};
  }
  return c;
}

// The rows of a strip by which a batch is done soonest; no bit of a product depends on it. A gradient's follow from the
// batch alone (threads is 1), as the order of its sums follows from it.
template <class T>
int SparseConvolution<T>::rows_for(What what, int64_t batch, int threads) const {
  const Window& w = matrix_.window;
  const int step = what == What::kTransposed ? w.stride[0] : 1, height = what == What::kTransposed ? w.source[0] : w.target[0];
  int best = step;
  double least = 0;
  for (int rows = step; rows < height + step; rows += step) {
    const Cut c = cut({what, rows});
    const int64_t tiles = divided_up(batch * c.strips, kernels_.lanes);
    const double numbers = double(c.read.planes) * c.read.rows * c.read.width + double(c.other.planes) * rows * c.other.width;
    const bool far = numbers * kernels_.lanes * sizeof(T) > kTileBytes;
    const double sums = double(nnz()) * rows * w.target[1] / (what == What::kTransposed ? w.stride[0] : 1);
    const double cost = double(divided_up(tiles, threads)) * (sums + kTurn * numbers) * (far ? kFarTile : 1.0);
    if (least == 0 || cost < least) least = cost, best = rows;
  }
  return best;
}

template <class T>
typename SparseConvolution<T>::Packing& SparseConvolution<T>::packing(const Key& key) {
  return recent(packings_, key, kPackings, [&] {
    auto made = std::make_unique<Packing>();
    Program<T>& p = made->program;
    Matrix<T> m = matrix_;
    const int out = matrix_.pattern_rows(), in = matrix_.cols / matrix_.window.source_area();
    m.window = cut(key).window;
    m.rows = out * m.window.target_area(), m.cols = in * m.window.source_area();
    p.buffers = {{m.cols, 1}, {m.rows, 1}};
    p.dim = m.cols;
    p.input = p.output = 0;
    Op op;
    op.matrix = 0;
    if (key.what == What::kGradient) {
      p.cotangent = p.state_cotangent = 0;
      p.sums.push_back({m.nnz(), false});
      op.kind = OpKind::kGradient;
      op.sum = 0;
      op.source = {0, 0}, op.factor = {1, 0};
      p.reverse.push_back(op);
    } else {
      op.kind = OpKind::kProduct;
      op.transposed = key.what == What::kTransposed;
      op.source = {op.transposed, 0}, op.target = {!op.transposed, 0};
      p.body.push_back(op);
    }
    p.matrices.push_back(std::move(m));
    made->packed = pack(p, kernels_, 0);
    return made;
  });
}

// Strips [first, end) of the batch, as [planes][rows][width][lanes]; lanes beyond are zero, they add nothing to a gradient.
template <class T>
void SparseConvolution<T>::load(const T* x, const Strips& of, int strips, int64_t first, int64_t end, T* rows) const {
  using S = Small<T>;
  constexpr int L = S::kLanes;
  const int lanes = kernels_.lanes, width = of.width;
  const std::vector<T> zeros(width, T(0));
  std::vector<const T*> lines(lanes);
  for (int plane = 0; plane < of.planes; ++plane)
    for (int r = 0; r < of.rows; ++r, rows += ptrdiff_t(width) * lanes) {
      for (int l = 0; l < lanes; ++l) {
        const int64_t image = (first + l) / strips, y = int64_t(of.first) + (first + l) % strips * of.step + r;
        const bool there = first + l < end && y >= 0 && y < of.height;
        lines[l] = there ? x + ((image * of.planes + plane) * of.height + y) * width : zeros.data();
        if (there && plane + 1 < of.planes) fetch<T, 0>(lines[l] + ptrdiff_t(of.height) * width, width);
      }
      for (int l = 0; l < lanes; l += L) {
        int c = 0;
        for (; c + L <= width; c += L) {
          typename S::V v[L];
          for (int i = 0; i < L; ++i) __builtin_memcpy(v + i, lines[l + i] + c, sizeof v[0]);
          S::transpose(v);
          for (int i = 0; i < L; ++i) __builtin_memcpy(rows + ptrdiff_t(c + i) * lanes + l, v + i, sizeof v[0]);
        }
        for (; c < width; ++c)
          for (int i = 0; i < L; ++i) rows[ptrdiff_t(c) * lanes + l + i] = lines[l + i][c];
      }
    }
}

template <class T>
void SparseConvolution<T>::store(const T* rows, const Strips& of, int strips, int64_t first, int64_t end, const T* bias, T* out) const {
  using S = Small<T>;
  constexpr int L = S::kLanes;
  const int lanes = kernels_.lanes, width = of.width;
  std::vector<T> nowhere(width);
  std::vector<T*> lines(lanes);
  for (int plane = 0; plane < of.planes; ++plane)
    for (int r = 0; r < of.rows; ++r, rows += ptrdiff_t(width) * lanes) {
      for (int l = 0; l < lanes; ++l) {
        const int64_t image = (first + l) / strips, y = (first + l) % strips * of.step + r;
        const bool there = first + l < end && y < of.height;
        lines[l] = there ? out + ((image * of.planes + plane) * of.height + y) * width : nowhere.data();
        if (there && plane + 1 < of.planes) fetch<T, 1>(lines[l] + ptrdiff_t(of.height) * width, width);
      }
      const T more = bias ? bias[plane] : T(0);
      for (int l = 0; l < lanes; l += L) {
        int c = 0;
        for (; c + L <= width; c += L) {
          typename S::V v[L];
          for (int i = 0; i < L; ++i) __builtin_memcpy(v + i, rows + ptrdiff_t(c + i) * lanes + l, sizeof v[0]);
          S::transpose(v);
          for (int i = 0; i < L; ++i) {
            if (bias) v[i] += more;
            __builtin_memcpy(lines[l + i] + c, v + i, sizeof v[0]);
          }
        }
        for (; c < width; ++c)
          for (int i = 0; i < L; ++i) {
            const T value = rows[ptrdiff_t(c) * lanes + l + i];
            lines[l + i][c] = bias ? value + more : value;
          }
      }
    }
}

template <class T>
char* SparseConvolution<T>::workspace(int worker, size_t bytes) {
  Aligned<char>& memory = workspaces_[worker];
  if (memory.size() < bytes) memory = Aligned<char>(bytes);
  return memory.get();
}

template <class T>
void SparseConvolution<T>::multiply(bool transposed, const T* values, const T* x, int64_t batch, const T* bias, int threads, T* out) {
  if (batch == 0) return;
  const Exclusive::Hold held(one_caller_);
  threads = std::max(1, threads);
  if (nnz() > 0 && (values_.empty() || std::memcmp(values_.data(), values, nnz() * sizeof(T)) != 0)) {
    values_.assign(values, values + nnz());
    ++generation_;
  }
  const What what = transposed ? What::kTransposed : What::kProduct;
  const Key key{what, rows_for(what, batch, threads)};
  const Cut c = cut(key);
  Packing& packing = this->packing(key);
  Packed<T>& packed = *packing.packed;
  if (packing.generation != generation_ && nnz() > 0) {
    set_values(packing.program, 0, values_);
    reweave(packing.program, packed, 0);
    packing.generation = generation_;
  }
  const Stage<T> stage(packing.program, packed, kernels_);
  const int64_t lanes = kernels_.lanes, strips = batch * c.strips;
  const int tiles = divided_up(strips, lanes), workers = std::min(threads, tiles);
  if (static_cast<int>(workspaces_.size()) < workers) workspaces_.resize(workers);
  const int source = transposed ? 1 : 0;
  parallel_for(tiles, workers, Work{multiply_, double(packed.body[0].work)}, [&](int tile, int worker) {
    char* const ws = workspace(worker, packed.workspace_bytes);
    const int64_t first = tile * lanes, end = std::min(strips, first + lanes);
    load(x, c.read, c.strips, first, end, reinterpret_cast<T*>(ws + packed.buffer_offset[source]));
    stage.run(packed.body, ws);
    store(reinterpret_cast<const T*>(ws + packed.buffer_offset[1 - source]), c.other, c.strips, first, end, bias, out);
  });
}

// Tiles go in chunks of neighbours, each with sums of its own, which are added in their order.
template <class T>
void SparseConvolution<T>::gradient(const T* left, const T* right, int64_t batch, int threads, T* sums) {
  std::fill_n(sums, nnz(), T(0));
  if (batch == 0 || nnz() == 0) return;
  const Exclusive::Hold held(one_caller_);
  const Key key{What::kGradient, rows_for(What::kGradient, batch, 1)};
  const Cut c = cut(key);
  const Packing& packing = this->packing(key);
  const Packed<T>& packed = *packing.packed;
  const Stage<T> stage(packing.program, packed, kernels_);
  const int64_t lanes = kernels_.lanes, strips = batch * c.strips;
  const int64_t tiles = divided_up(strips, lanes);
  const int chunks = static_cast<int>(std::min<int64_t>(tiles, kChunks)), workers = std::clamp(threads, 1, chunks);
  if (static_cast<int>(workspaces_.size()) < workers) workspaces_.resize(workers);
  std::vector<T> totals(size_t(chunks) * nnz(), T(0));
  parallel_for(chunks, workers, Work{gradient_, double(packed.reverse[0].work) * double(tiles) / chunks}, [&](int chunk, int worker) {
    char* const ws = workspace(worker, packed.workspace_bytes);
    for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
      const int64_t first = tile * lanes, end = std::min(strips, first + lanes);
      load(right, c.read, c.strips, first, end, reinterpret_cast<T*>(ws + packed.buffer_offset[0]));
      load(left, c.other, c.strips, first, end, reinterpret_cast<T*>(ws + packed.buffer_offset[1]));
      stage.run(packed.reverse, ws, totals.data() + size_t(chunk) * nnz());
    }
  });
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int e = 0; e < nnz(); ++e) sums[e] += totals[size_t(chunk) * nnz() + e];
}

template class SparseConvolution<float>;
template class SparseConvolution<double>;

}  // namespace sparseflow
