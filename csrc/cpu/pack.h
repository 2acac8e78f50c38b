// A program made ready for one tile width: matrices as streams of steps with byte offsets, buffers as a workspace layout.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "../calls.h"
#include "../validate.h"
#include "kernels.h"

namespace sparseflow {

// Zeroed, 64-byte aligned memory of its own.
template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(size_t n) : size_(n) {
    const size_t bytes = (n * sizeof(T) + 127) / 64 * 64;  // one line to spare: streams may be read one entry ahead
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    constexpr size_t kPiece = size_t(64) << 20;  // new memory is slow to write
    for (size_t at = 0; at < bytes; at += kPiece) {
      if (at > 0) look();
      __builtin_memset(reinterpret_cast<char*>(data_.get()) + at, 0, bytes - at < kPiece ? bytes - at : kPiece);
    }
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

// An expression with its places in the workspace (kernels.h).
template <class T>
struct PackedPointwise {
  std::vector<PointwiseStep<T>> steps;
  std::vector<PointwisePlace> places;
  std::vector<uint16_t> traces;
  std::vector<PointwiseTotal> totals;
  int strip = 1;
};

template <class T>
struct PackedOp {
  const Op* op = nullptr;
  int repeats = -1;  // index, in its list, of the operation that it says again; nothing below is filled then
  RowKernel<T> kernel = nullptr;
  int64_t work = 0;  // multiply-adds for a tile, about
  RowArgs<T> args{};  // everything but what depends on the workspace or the stage
  ptrdiff_t source = 0, target = 0, seed = 0, weight = 0, factor = 0, factor2 = 0, addend = 0, kept = 0, slope_cotangent = 0, value = 0;  // workspace offsets, bytes; -1 absent
  std::vector<Aligned<char>> streams;  // one per block
  std::vector<std::vector<int32_t>> counts, rows;
  std::vector<PackedBlock<T>> blocks;
  struct Place {
    uint32_t block, byte;
  };
  std::vector<Place> places;  // where the weight of every entry lies
  int dynamic = -1;           // index among the dynamic ops

  PackedPointwise<T> pointwise;

  // convolutions: a block for every grid
  Planes planes{};
  std::vector<PlaneGrid> grids;
  ptrdiff_t band_bytes = 0;
  void (*plane_gradient)(const PlaneGradientArgs<T>&) = nullptr;

  // gradients: dense blocks, runs of entries, and which entry of the matrix each sum is (-1: none)
  void (*gradient)(const GradientArgs<T>&) = nullptr;
  std::vector<uint32_t> dense;
  std::vector<GradientRun> runs;
  std::vector<uint32_t> right;
  std::vector<int32_t> runs_of_batch, entry;
  size_t sums = 0;  // where they are added, among the sums of a stage or of all time
};

template <class T>
struct Packed {
  int width = 0, width_index = 0;
  std::vector<ptrdiff_t> buffer_offset;  // bytes
  size_t workspace_bytes = 0;
  ptrdiff_t reduce_offset = 0;
  ptrdiff_t scratch_offset = 0, scratch_bytes = 0;  // registers of expressions
  std::vector<PackedOp<T>> prologue, body, keep, reverse;
  int dynamic_ops = 0;
  size_t lasting_sums = 0, stage_sums = 0;  // numbers that the gradients of `reverse` add up, per place to add them

  ptrdiff_t row_bytes(const Buffer& b) const { return ptrdiff_t(b.slots) * width * ptrdiff_t(sizeof(T)); }
  size_t bytes() const {  // of the weights and of where they lie
    size_t total = 0;
    for_each_op([&](const PackedOp<T>& op) {
      for (const Aligned<char>& stream : op.streams) total += stream.size();
      total += op.places.size() * sizeof(typename PackedOp<T>::Place);
    });
    return total;
  }
  template <class F>
  void for_each_op(F visit) const {
    for (const auto* ops : {&prologue, &body, &keep, &reverse})
      for (const PackedOp<T>& op : *ops) visit(op);
  }
};

template <class T>
std::unique_ptr<Packed<T>> pack(const Program<T>& program, const Kernels<T>& kernels, int width_index);

// One operation of it, and how it runs (pack_pointwise.cpp). vectors: where the row vectors' numbers are.
template <class T>
PackedOp<T> pack_pointwise(const Op& op, const Program<T>& program, Packed<T>& packed);
template <class T>
void run_pointwise(const PackedOp<T>& op, const Packed<T>& packed, const Kernels<T>& kernels, const std::vector<const T*>& vectors, char* workspace);

// An operation with a convolution: its bands, steps and places (pack_planes.cpp), and how the gradient of one runs.
template <class T>
void pack_planes(PackedOp<T>& out, const Op& op, const Program<T>& program, Packed<T>& packed, const Kernels<T>& kernels);
template <class T>
void run_plane_gradient(const PackedOp<T>& op, const Packed<T>& packed, char* workspace, T* sums);

// Weaves the values of a constant matrix anew, where it was packed before.
template <class T>
void reweave(const Program<T>& program, const Packed<T>& packed, int matrix);

// New numbers for a program: a matrix's values (of a gated one the path constants), a modulation's arrays and a constant row
// vector. As many as there were; throws std::invalid_argument otherwise.
template <class T>
void set_values(Program<T>& program, int matrix, std::vector<T> values);
template <class T>
void set_modulation(Program<T>& program, int modulation, std::vector<T> bias, std::vector<T> gate_slope, std::vector<T> gate_offset,
                    std::vector<T> shift_slope, std::vector<T> shift_offset);
template <class T>
void set_vector(Program<T>& program, int vector, std::vector<T> values);

// What depends on time, for one evaluation: scale and shift of every modulation, values of every dynamic matrix and
// coefficient, and the streams they are woven into; and the time answer, which timed row vectors are rows of.
template <class T>
class Stage {
 public:
  Stage(const Program<T>& program, const Packed<T>& packed, const Kernels<T>& kernels);
  // Gradients add to `lasting`, those of a sum that is taken away after every evaluation to `each_stage`.
  void run(const std::vector<PackedOp<T>>& ops, char* workspace, T* lasting = nullptr, T* each_stage = nullptr, size_t first = 0,
           size_t count = SIZE_MAX) const;

  const std::vector<T>& scale(int modulation) const { return scale_[modulation]; }

  // Makes several stages ready for their times at once. answers[i]: what the refresh callback said for time i, one array
  // per external of the program; empty if it has none. time_answers: [times][time_rows].
  static void refresh(std::vector<Stage<T>>& stages, const std::vector<T>& times, const std::vector<std::vector<std::vector<T>>>& answers,
                      const std::vector<T>& time_answers);

 private:
  void modulate(T t, const std::vector<std::vector<T>>* answers);
  void weave(int matrix, const T* values);

  const Program<T>* program_;
  const Packed<T>* packed_;
  const Kernels<T>* kernels_;
  std::vector<std::vector<T>> scale_, shift_;                 // by modulation
  std::vector<T> time_answer_;
  std::vector<const T*> vectors_;                             // by row vector: its numbers
  std::vector<std::vector<T>> coefficients_;                  // by matrix, those of one row only
  std::vector<std::vector<Aligned<char>>> streams_;           // by dynamic op, by block
  std::vector<std::vector<PackedBlock<T>>> blocks_;           // by dynamic op
  bool fresh_ = false;
};

}  // namespace sparseflow
