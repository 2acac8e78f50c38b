// The kernels of convolutions: sums for the pixels of a row of a target plane (Planes in kernels.h), with whatever follows a
// row of the matrix behind them, and the gradient of the weights.
//
// A weight and one offset serve neighbouring pixels of a row, which lie side by side in the band, samples innermost: as many
// vectors as there are registers are one run of memory. Every pixel is one chain of multiply-adds in the order of the
// entries of its plane, so its bits depend on nothing else.
#pragma once

#include <utility>

#include "kernels.h"
#include "simd.h"

namespace sparseflow::SPARSEFLOW_ISA {

template <class T, int NV>
struct Row {
  Vec<T> v[NV];
};

// Sums in registers at a time, beside the weight and what the processor needs for the operands.
inline constexpr int kMostSums = kRegisters == 32 ? 28 : 12;

template <class T, int N>
__attribute__((noinline)) void multiply_run(const char* steps, int count, const char* source, Vec<T>* sums) {
  const Step<T, 1>* step = reinterpret_cast<const Step<T, 1>*>(steps);
  Vec<T> acc[N];
#pragma GCC unroll 28
  for (int v = 0; v < N; ++v) acc[v] = Vec<T>{};
  for (int k = 0; k < count; ++k, ++step) {
    const Vec<T> w = splat<T>(step->weight[0]);
    const Vec<T>* const x = reinterpret_cast<const Vec<T>*>(source + step->offset[0]);
#pragma GCC unroll 28
    for (int v = 0; v < N; ++v) acc[v] += w * x[v];
  }
#pragma GCC unroll 28
  for (int v = 0; v < N; ++v) sums[v] = acc[v];
}

// sums[e] += left * right at the offsets of the steps, N vectors each.
template <class T, int N>
__attribute__((noinline)) void gradient_run(const char* steps, int count, const char* right, const Vec<T>* left, Vec<T>* sums) {
  const Step<T, 1>* step = reinterpret_cast<const Step<T, 1>*>(steps);
  Vec<T> y[N];
#pragma GCC unroll 28
  for (int v = 0; v < N; ++v) {
    y[v] = left[v];
    keep_in_register(y[v]);
  }
  for (int k = 0; k < count; ++k, ++step) {
    const Vec<T>* const x = reinterpret_cast<const Vec<T>*>(right + step->offset[0]);
    Vec<T> even = sums[k], odd = Vec<T>{};
#pragma GCC unroll 28
    for (int v = 0; v < N; ++v) (v % 2 == 0 ? even : odd) += y[v] * x[v];
    sums[k] = even + odd;
  }
}
inline constexpr int kMostFactors = kRegisters == 32 ? 28 : 12;

template <class T>
using MultiplyRun = void (*)(const char*, int, const char*, Vec<T>*);
template <class T>
using GradientRuns = void (*)(const char*, int, const char*, const Vec<T>*, Vec<T>*);
template <class Function, int Most>
struct Runs {
  Function of[Most];  // of[n - 1] is for n vectors
};
template <class T, int... N>
constexpr Runs<MultiplyRun<T>, sizeof...(N)> multiply_runs(std::integer_sequence<int, N...>) {
  return {{multiply_run<T, N + 1>...}};
}
template <class T, int... N>
constexpr Runs<GradientRuns<T>, sizeof...(N)> gradient_runs(std::integer_sequence<int, N...>) {
  return {{gradient_run<T, N + 1>...}};
}
template <class T>
inline constexpr auto kMultiplyRuns = multiply_runs<T>(std::make_integer_sequence<int, kMostSums>{});
template <class T>
inline constexpr auto kGradientRuns = gradient_runs<T>(std::make_integer_sequence<int, kMostFactors>{});

// Pixels of a row of `columns` that are done at a time, with NV vectors each: about as many every time.
template <int NV>
constexpr int pixels_at_a_time(int columns, int most) {
  const int fit = most / NV > 0 ? most / NV : 1, times = (columns + fit - 1) / fit;
  return (columns + times - 1) / times;
}

// Rows [begin, end) of the band of the source whose first row is read by the grid's row `row`; `vectors` vectors of a pixel.
template <class T>
__attribute__((noinline)) void copy_rows(const Planes& p, const char* source, ptrdiff_t source_stride, int row, int begin, int end_row, int vectors, char* band) {
  const int groups = p.stride_x, columns = p.band_columns;
  Vec<T>* to = nullptr;
  Vec<T> zero{};
  keep_in_register(zero);  // else a call to clear memory, for a few bytes
  const bool packed = groups == 1 && source_stride == ptrdiff_t(vectors) * ptrdiff_t(sizeof(Vec<T>));
  auto zeros = [&](int pixels) {
    for (int i = pixels * vectors; i > 0; --i) *to++ = zero;
  };
  for (int plane = 0; plane < p.source_planes; ++plane) {
    const char* const pixels = source + ptrdiff_t(plane) * p.source_height * p.source_width * source_stride;
    to = reinterpret_cast<Vec<T>*>(band) + (ptrdiff_t(plane) * p.band_rows + begin) * groups * columns * vectors;
    for (int r = begin; r < end_row; ++r) {
      const int y = p.first_y + row * p.stride_y + r;
      if (y < 0 || y >= p.source_height) {
        zeros(groups * columns);
        continue;
      }
      const char* const line = pixels + ptrdiff_t(y) * p.source_width * source_stride;
      for (int g = 0; g < groups; ++g) {
        const int x0 = p.first_x + g;
        int q = 0, end = 0;  // the columns that there are
        while (q < columns && x0 + q * groups < 0) ++q;
        if (x0 < p.source_width) end = (p.source_width - x0 + groups - 1) / groups;
        end = end < q ? q : end > columns ? columns : end;
        zeros(q);
        if (packed) {
          const Vec<T>* from = reinterpret_cast<const Vec<T>*>(line + ptrdiff_t(x0 + q) * source_stride);
          for (int i = (end - q) * vectors; i > 0; --i) *to++ = *from++;
        } else {
          for (; q < end; ++q) {
            const Vec<T>* from = reinterpret_cast<const Vec<T>*>(line + ptrdiff_t(x0 + q * groups) * source_stride);
            for (int v = 0; v < vectors; ++v) *to++ = from[v];
          }
        }
        zeros(columns - end);
      }
    }
  }
}

// visit(block, row of the grid, row within the band) for all rows of all grids. What a row reads is copied just before: then
// only the rows that a few of its neighbours read have to stay in a near cache, however many a band has.
template <class T, class Visit>
SF_INLINE void for_each_grid_row(const Planes& p, int grids, const char* source, ptrdiff_t source_stride, int vectors, char* band, Visit visit) {
  int rows = 0;
  for (int g = 0; g < grids; ++g) rows = p.grids[g].rows > rows ? p.grids[g].rows : rows;
  for (int first = 0; first < rows; first += p.band) {
    int ready = 0;
    for (int m = first; m < first + p.band && m < rows; ++m) {
      const int end = (m - first) * p.stride_y + p.reach + 1;
      copy_rows<T>(p, source, source_stride, first, ready, end, vectors, band);
      ready = end;
      for (int g = 0; g < grids; ++g)
        if (m < p.grids[g].rows) visit(g, m, m - first);
    }
  }
}

template <class T, int NV, class Finish>
SF_INLINE void for_each_pixel(const RowArgs<T>& args, Finish& finish) {
  const Planes& p = *args.planes;
  constexpr int kMost = NV > kMostSums ? NV : kMostSums;
  constexpr ptrdiff_t kPixel = NV * sizeof(Vec<T>);
  const ptrdiff_t line = ptrdiff_t(p.stride_x) * p.band_columns * kPixel;
  Vec<T> sums[kMost];
  for_each_grid_row<T>(p, args.matrix.n_blocks, args.source, args.source_stride, NV, args.scratch, [&](int b, int m, int within) {
    const PackedBlock<T>& block = args.matrix.blocks[b];
    const PlaneGrid& grid = p.grids[b];
    const char* const at = args.scratch + within * p.stride_y * line;
    const int pixels = pixels_at_a_time<NV>(grid.columns, kMostSums);
    const char* steps = block.steps;
    for (int plane = 0; plane < p.target_planes; ++plane) {
      const int count = block.counts[plane], row = plane * p.target_area + grid.first + m * grid.row_step;
      for (int n = 0; n < grid.columns; n += pixels) {
        const int now = grid.columns - n < pixels ? grid.columns - n : pixels;
        kMultiplyRuns<T>.of[now * NV - 1](steps, count, at + n * kPixel, sums);
        for (int i = 0; i < now; ++i) finish.row(row + (n + i) * grid.column_step, sums + i * NV);
      }
      steps += count * sizeof(Step<T, 1>);
      finish.pause();
    }
  });
}

template <class T, int NV>
void plane_gradient(const PlaneGradientArgs<T>& args) {
  const Planes& p = *args.planes;
  const PlaneGrid& grid = p.grids[0];
  constexpr int kMost = NV > kMostFactors ? NV : kMostFactors;
  constexpr ptrdiff_t kPixel = NV * sizeof(Vec<T>);
  const ptrdiff_t line = ptrdiff_t(p.stride_x) * p.band_columns * kPixel;
  const int pixels = pixels_at_a_time<NV>(grid.columns, kMostFactors);
  Vec<T>* const totals = reinterpret_cast<Vec<T>*>(args.scratch + args.band_bytes);
  for (int e = 0; e < args.entries; ++e) totals[e] = Vec<T>{};
  Vec<T> left[kMost];
  for_each_grid_row<T>(p, 1, args.right, args.right_stride, NV, args.scratch, [&](int, int m, int within) {
    const char* const at = args.scratch + within * p.stride_y * line;
    const char* steps = args.steps;
    Vec<T>* sums = totals;
    for (int plane = 0; plane < p.target_planes; ++plane) {
      const int count = args.counts[plane];
      const char* row = args.left + (ptrdiff_t(plane) * p.target_area + m * grid.row_step) * args.left_stride;
      for (int n = 0; n < grid.columns && count > 0; n += pixels) {
        const int now = grid.columns - n < pixels ? grid.columns - n : pixels;
        for (int i = 0; i < now; ++i, row += args.left_stride)
          for (int v = 0; v < NV; ++v) left[i * NV + v] = reinterpret_cast<const Vec<T>*>(row)[v];
        kGradientRuns<T>.of[now * NV - 1](steps, count, at + n * kPixel, left, sums);
      }
      steps += count * sizeof(Step<T, 1>);
      sums += count;
    }
  });
  for (int e = 0; e < args.entries; ++e) {
    T total = T(0);
    for (int lane = 0; lane < Simd<T>::kLanes; ++lane) total += totals[e][lane];
    args.sums[e] += total;
  }
}

}  // namespace sparseflow::SPARSEFLOW_ISA
