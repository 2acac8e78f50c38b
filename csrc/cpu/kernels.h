// What the portable driver and the per-instruction-set kernels say to each other: plain structs and one table of
// function pointers. No inline functions here, so nothing of it can be compiled twice with different instructions.
//
// A tile is a group of `width` samples. Its workspace is an array of rows; a row holds `slots` blocks of `width`
// samples, the value of one neuron in slot 0 and, where the program carries one, its tangent or slope in slot 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activations.h"
#include "../expression.h"
#include "../operations.h"

namespace sparseflow {

// A packed matrix is one stream of steps. A step serves the `rows_in_flight` rows of a group, one entry each: first
// their weights, then the byte offsets of the activation rows they multiply (two offsets are one 64-bit load).
template <class T, int R>
struct Step {
  T weight[R];
  uint32_t offset[R];
};
template <class T>
constexpr size_t step_bytes(int rows_in_flight) {
  const size_t bytes = size_t(rows_in_flight) * (sizeof(T) + sizeof(uint32_t));
  return (bytes + alignof(T) - 1) / alignof(T) * alignof(T);
}

// A step of a dense group serves `dense_rows` rows with one column: a weight each, zero where a row has no entry.
template <class T, int R>
struct DenseStep {
  T weight[R];
  uint32_t offset;
};
template <class T>
constexpr size_t dense_step_bytes(int dense_rows) {
  const size_t bytes = size_t(dense_rows) * sizeof(T) + sizeof(uint32_t);
  return (bytes + alignof(T) - 1) / alignof(T) * alignof(T);
}

// A sparse matrix packed for one tile width. Rows are sorted by length and taken `rows_in_flight` at a time (a group),
// shorter rows of a group padded with zero weights. Wide matrices are cut into blocks of columns, so that a block's
// activations stay in the first-level cache; a block continues the sums of the one before it. A block whose rows have
// most of its columns is dense: its groups are of `dense_rows`, a multiple, each with all the columns of its rows.
template <class T>
struct PackedBlock {
  const char* steps;
  const int32_t* counts;  // [groups, or dense groups] steps of each
  const int32_t* rows;    // [groups * rows_in_flight]; the row number, or n_rows for a padded one
  int32_t groups;         // of rows_in_flight
  bool dense;
};

template <class T>
struct PackedMatrix {
  const PackedBlock<T>* blocks;
  int32_t n_blocks;
  int32_t n_rows;  // a padded row bears this number; nobody looks at what it sums up to
};

// The product of a convolution, or of its transpose: rows and columns of the matrix are pixels of planes, and one stream of
// steps serves all pixels of a grid, since each reads the source at the same offsets from its own place. The source is
// copied, a band of its rows at a time, with zeros around, so that it lies in a near cache and no pixel is a special one. Pixels
// of the grid that are neighbours in a row read neighbours: columns of the band lie in `stride_x` groups, each of every
// stride_x-th. A grid is one block of the packed matrix, with a step for every entry and a count for every target plane.
struct PlaneGrid {
  int32_t rows, columns;
  int32_t first, row_step, column_step;  // pixel (m, n) is row first + m row_step + n column_step of a target plane
};
struct Planes {
  int32_t source_planes, source_height, source_width, target_planes, target_area;
  int32_t stride_y, stride_x;  // in the source, from pixel to pixel of a grid
  int32_t first_y, first_x;    // of the source, for the pixel (0, 0) of a grid
  int32_t band;                // rows of a grid done at a time
  int32_t reach;               // rows of the source that a pixel reads besides its first
  int32_t band_rows, band_columns;  // of the copy; columns of one group
  const PlaneGrid* grids;
};

// The arguments of every row kernel. Pointers are into the workspace of one tile; strides are bytes per row.
template <class T>
struct RowArgs {
  PackedMatrix<T> matrix;
  const char* source;
  char* target;  // rows of `slots` blocks
  ptrdiff_t target_stride;
  // affine: z = scale[row] * (W h) + shift[row]
  const T* scale;
  const T* shift;
  T a, b, inverse_a;  // activation parameters
  Store store;
  const char* seed;  // kSeed*
  const char* weight;  // k*Reduce; null: 1
  ptrdiff_t seed_stride, weight_stride;
  T* reduce;  // [width] sums over rows
  // product: target[row] = factor[i[row]] * (W source);  reduction: reduce += coefficient[row] f[i[row]] g[j[row]] (W source)
  const char* factor;
  const char* factor2;
  ptrdiff_t factor_stride, factor2_stride;
  const int32_t* factor_row;   // null: the row itself
  const int32_t* factor2_row;  // null: the row itself
  const T* coefficient;        // null: 1
  const char* addend;          // product, pull; null: nothing
  ptrdiff_t addend_stride;
  bool second;                 // product: slot 1 of the target = factor2 * (W source)
  // keep, pull (csrc/field.h)
  char* kept;
  const char* slope_cotangent;  // pull: the cotangent of d; null: nothing
  const char* value;            // pull: the rows keep wrote its value and tangent to
  ptrdiff_t kept_stride, slope_cotangent_stride, value_stride;
  bool curvature, raw;
  bool slopes;                  // keep: d and c (or e) are kept
  const Planes* planes;         // of a convolution; null: none
  ptrdiff_t source_stride;      // of a convolution
  char* scratch;                // of a convolution: for a band
};

// sums[e] += over samples of left[row] * right[column] for every entry e. First come dense blocks: all products of a few
// rows and a few columns, one for every lane of a vector. Other entries are taken `kGradientBatch` at a time; a row's
// entries are one run, or two where a batch ends inside the row.
constexpr int gradient_block_rows(int lanes) { return lanes < 16 ? 2 : 4; }
constexpr int gradient_block_offsets(int lanes) { return gradient_block_rows(lanes) + lanes / gradient_block_rows(lanes); }
inline constexpr int kGradientBatch = 64;
struct GradientRun {
  uint32_t left;   // byte offset in the workspace
  int32_t count;
};
template <class T>
struct GradientArgs {
  const char* workspace;
  const uint32_t* dense;  // [dense_blocks][rows, then columns] byte offsets in the workspace
  int32_t dense_blocks;
  const GradientRun* runs;
  const uint32_t* right;  // byte offsets in the workspace, one per entry
  int32_t batches;
  const int32_t* runs_of_batch;  // [batches]
  T* sums;                       // [dense_blocks * lanes, row by row; then batches * kGradientBatch]
};

// sums[e] += over samples and pixels of left[pixel] * right[the pixel that the tap of entry e reads], for a convolution.
template <class T>
struct PlaneGradientArgs {
  const Planes* planes;
  const char* steps;      // as of a product; weights are not looked at
  const int32_t* counts;
  const char* left;       // rows of the target
  const char* right;      // rows of the source
  ptrdiff_t left_stride, right_stride;
  char* scratch;          // a band, and behind it a vector for every entry
  ptrdiff_t band_bytes;
  int32_t entries;
  T* sums;
};

// An expression over a tile. It runs strip by strip, a few rows long: one instruction over all of a strip, then the next.
template <class T>
struct PointwiseStep {
  Instruct op;
  uint16_t to, a, b, c;  // places; what is not read is `to`. Of an instruction with a row vector, b is its number.
  T number;
};
struct PointwisePlace {
  ptrdiff_t offset;   // bytes in the workspace
  ptrdiff_t stride;   // bytes from row to row of a strip; 0: one row serves all
  ptrdiff_t advance;  // the same from strip to strip; 0: registers, whose rows the strips share
};
struct PointwiseTotal {
  ptrdiff_t target;  // bytes in the workspace, of the row that a place's rows are summed up to
  uint16_t place;
};
template <class T>
struct RowNumbers {
  const T* values;
  int32_t stride;  // 1, or 0: one number serves all rows
};
template <class T>
struct PointwiseArgs {
  char* workspace;
  const PointwiseStep<T>* steps;
  const PointwisePlace* places;
  const RowNumbers<T>* numbers;
  const uint16_t* traces;  // places whose rows are added to `reduce`
  const PointwiseTotal* totals;
  int32_t n_steps, n_traces, n_totals;
  int32_t rows, strip;     // all rows, and those of a strip
  int32_t row_vectors;     // machine vectors to a row of the tile
  T* reduce;
};

template <class T>
using RowKernel = void (*)(const RowArgs<T>&);

// Elementwise work of the solver on whole rows of one tile, [rows][width] contiguous.
template <class T>
struct Kernels {
  int lanes;

  // Tile widths are `lanes * vectors` for the vectors offered here, ascending; index them by `width_index`.
  static constexpr int kWidths = 5;
  int vectors[kWidths];
  int rows_in_flight[kWidths];
  int rows_in_flight_tangent[kWidths];  // kernels with a tangent beside the primal
  int dense_rows[kWidths];              // 0: no dense groups at this width
  int dense_rows_tangent[kWidths];

  // index [1] is of convolutions, in kernels of their own: a choice within one slows its other half
  RowKernel<T> affine[2][kActivations][kWidths];          // by activation; primal only
  RowKernel<T> affine_tangent[2][kActivations][kWidths];  // the source rows carry a tangent in slot 1
  RowKernel<T> product[2][kWidths];
  RowKernel<T> reduction[kWidths];
  // the adjoint's; index [1] carries a tangent. Null for the widths they are not offered for.
  RowKernel<T> keep[2][kActivations][kWidths];
  RowKernel<T> pull[kSlopesFrom][2][kWidths];
  void (*gradient[2][kWidths])(const GradientArgs<T>&);
  void (*plane_gradient[2][kWidths])(const PlaneGradientArgs<T>&);
  void (*pointwise)(const PointwiseArgs<T>&);

  // out = y + sum_j c[j] k[j] over n values
  void (*combine)(const T* y, const T* const* k, const T* c, int terms, int n, T* out);
  // sums[i] += (sum_j c[j] k[j][i] / (atol + rtol max(|y0|, |y1|)))^2 for the columns i of one row, in double
  void (*error_row)(const T* y0, const T* y1, const T* const* k, const T* c, int terms, T rtol, T atol, int n, double* sums);
  // the quartic of torchdiffeq through y0, y1, mid, f0, f1 at fraction x of the step
  void (*interpolate)(const T* y0, const T* y1, const T* mid, const T* f0, const T* f1, T dt, T x, int n, T* out);
  void (*sigmoid)(const T* slope, const T* offset, T t, int n, T* out);
  void (*scale)(const T* x, T factor, int n, T* out);
  // for tests and measurements; curvature may be null
  void (*activation)(int activation, T a, T b, const T* z, int n, T* h, T* slope, T* curvature);
};

// dispatch.cpp
struct KernelSet {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};
const KernelSet& kernels();                 // the set in use: best the machine has, or SPARSEFLOW_ISA
int available_sets(const KernelSet** out);  // every compiled set this machine can run, worst first
double measure_fma_rate(double seconds);    // float32 multiply-adds per second of one core, with the set in use

}  // namespace sparseflow
