// A sparse convolution by itself: products with it and with its transpose over batches of the user, [batch][channels][height]
// [width], and the gradient of its values. A tile's samples are strips of images, a few rows each, so that a small batch
// fills a tile and a tile fits a near cache.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "pack.h"
#include "thread_pool.h"

namespace sparseflow {

template <class T>
class SparseConvolution {
 public:
  // The pattern is over (out, in * taps + tap), CSR, columns ascending; throws std::invalid_argument where it or the window
  // is not one that the kernels can run.
  SparseConvolution(int out, int in, std::vector<int32_t> row_ptr, std::vector<int32_t> col, const Window& window, const Kernels<T>& kernels);

  // out [batch][out][target] = W x + bias [out] for x [batch][in][source]; transposed: out [batch][in][source] = W' x. A null
  // bias is none. No bit depends on the threads, nor a sample's on the batch it is in.
  void multiply(bool transposed, const T* values, const T* x, int64_t batch, const T* bias, int threads, T* out);

  // sums [nnz]: the gradient of values for the cotangent `left` [batch][out][target] of the product with `right`
  // [batch][in][source]. No bit depends on the threads.
  void gradient(const T* left, const T* right, int64_t batch, int threads, T* sums);

  int nnz() const { return static_cast<int>(matrix_.col.size()); }
  int64_t source_size() const { return matrix_.cols; }
  int64_t target_size() const { return matrix_.rows; }

 private:
  enum class What { kProduct, kTransposed, kGradient };
  // A program for strips of `rows` rows of what is computed (of a gradient, of the cotangent).
  struct Key {
    What what;
    int rows;
    bool operator==(const Key& o) const { return what == o.what && rows == o.rows; }
  };
  struct Packing {
    Program<T> program;
    std::unique_ptr<Packed<T>> packed;
    int64_t generation = 0;  // of the values woven in
  };
  // Where strips lie: the first is at row `first` of the image (outside: zeros), the next `step` rows further, `rows` long.
  struct Strips {
    int planes, height, width, first, step, rows;
  };
  struct Cut {
    Strips read, other;  // of a product, what is written; of a gradient, the cotangent
    Window window;       // of one strip
    int strips;          // to an image
  };

  Cut cut(const Key& key) const;
  int rows_for(What what, int64_t batch, int threads) const;
  Packing& packing(const Key& key);
  void load(const T* x, const Strips& of, int strips, int64_t first, int64_t end, T* rows) const;
  void store(const T* rows, const Strips& of, int strips, int64_t first, int64_t end, const T* bias, T* out) const;
  char* workspace(int worker, size_t bytes);

  Matrix<T> matrix_;
  const Kernels<T>& kernels_;
  std::vector<std::pair<Key, std::unique_ptr<Packing>>> packings_;  // latest used last
  std::vector<Aligned<char>> workspaces_;                           // by worker
  std::vector<T> values_;                                           // the latest
  int64_t generation_ = 0;                                          // how many values there were before
  Cost multiply_, gradient_;
  Exclusive one_caller_{[this] {
    abandon(packings_), abandon(workspaces_), abandon(values_);
    generation_ = 0;
  }};
};

}  // namespace sparseflow
