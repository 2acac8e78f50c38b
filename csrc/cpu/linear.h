// A sparse linear layer by itself: products with its matrix and its transpose over batches of the user, [batch][features],
// and the gradient of its values. The pattern is packed once, for the tile widths that batches ask for; new values are
// woven into what is packed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pack.h"
#include "thread_pool.h"

namespace sparseflow {

template <class T>
class SparseLinear {
 public:
  // CSR, columns ascending; throws std::invalid_argument where it is not, or is too wide for the kernels.
  SparseLinear(int rows, int cols, std::vector<int32_t> row_ptr, std::vector<int32_t> col, const Kernels<T>& kernels);

  // out [batch][rows] = W x + bias for x [batch][cols]; transposed: out [batch][cols] = W' x for x [batch][rows]. A null
  // bias is none. values [nnz] are compared with those woven in before, so that any change of them is seen. No bit depends on
  // the threads, nor a sample's on the batch it is in.
  void multiply(bool transposed, const T* values, const T* x, int64_t batch, const T* bias, int threads, T* out);

  // sums [nnz] = sum over the batch of left [batch][rows] times right [batch][cols] at the entries: the gradient of values
  // for the cotangent `left` of the product with `right`. No bit depends on the threads.
  void gradient(const T* left, const T* right, int64_t batch, int threads, T* sums);

  // Products in tiles of this width from now on, an index into Kernels::vectors; -1: as the batch asks for.
  void force_width(int index);

  int rows() const { return matrix_.rows; }
  int cols() const { return matrix_.cols; }
  int nnz() const { return static_cast<int>(matrix_.col.size()); }

 private:
  // One product, or one gradient in slabs of rows, packed for the width of one kind of tile.
  struct Packing {
    Program<T> program;
    std::unique_ptr<Packed<T>> packed;
    int64_t generation = 0;  // of the values woven in
  };
  struct Product {
    bool transposed;
    int width_index;
    bool operator==(const Product& o) const { return transposed == o.transposed && width_index == o.width_index; }
  };
  struct Gradient {
    int kind, slabs;
    bool operator==(const Gradient& o) const { return kind == o.kind && slabs == o.slabs; }
  };

  int product_width(int64_t batch, int threads);
  double work(int width) const { return (double(nnz()) + matrix_.rows + matrix_.cols) * width; }  // of a tile, in multiply-adds or so
  int gradient_kind(int64_t batch) const;
  int gradient_width(int kind) const;
  Packing& product(bool transposed, int width_index);
  Packing& gradient_of(int kind, int slabs);
  Program<T> between_buffers(int slots) const;
  Program<T> product_program(bool transposed) const;
  Program<T> gradient_program(bool twice, int slabs) const;
  char* workspace(int worker, size_t bytes);

  Matrix<T> matrix_;
  const Kernels<T>& kernels_;
  std::vector<std::pair<Product, std::unique_ptr<Packing>>> products_;  // latest used last
  std::vector<std::pair<Gradient, std::unique_ptr<Packing>>> gradients_;
  std::vector<Aligned<char>> workspaces_;  // by worker
  Aligned<T> totals_;                      // of a gradient, in the order of what is packed
  std::vector<T> values_;  // the latest
  int64_t generation_ = 0;  // how many values there were before
  int forced_ = -1;
  Cost multiply_, gradient_, traffic_;  // of one entry and sample: a product, its gradient; of a number: loading or weaving it
  Exclusive one_caller_{[this] {
    abandon(products_), abandon(gradients_), abandon(workspaces_), abandon(totals_), abandon(values_);
    generation_ = 0;
  }};
};

}  // namespace sparseflow
