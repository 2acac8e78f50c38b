// The sparse kernels: rows of (sparse matrix) x (tile), with whatever follows a row fused behind it.
//
// A group of rows_in_flight rows of like length runs at once, each with its own accumulators, which hides the latency
// of the multiply-add; per entry one broadcast weight meets one activation row of the tile. The bits of a sample do not
// depend on the tile width, on its place in the tile or on the rows in flight: within a block of columns every row is one
// chain of multiply-adds in column order, and blocks and sums over rows follow one fixed order.
#pragma once

#include "kernels.h"
#include "vector_math.h"

namespace sparseflow::SPARSEFLOW_ISA {

// Accumulators are rows x vectors; eight or more chains cover the latency, and 16 registers must hold them (32 with AVX-512).
constexpr int rows_in_flight(int vectors) {
  return vectors <= 2 ? 4 : vectors <= 6 ? 2 : (kVectorBytes == 64 && vectors <= 8) ? 2 : 1;
}

template <class T, int NV>
struct Row {
  Vec<T> v[NV];
};

template <class T, int NV, int R>
SF_INLINE const Step<T, R>* multiply_rows(const Step<T, R>* step, int count, const char* source, Row<T, NV> (&acc)[R]) {
  static_assert(sizeof(Step<T, R>) == step_bytes<T>(R));
  for (int k = 0; k < count; ++k, ++step) {
    const Vec<T>* x[R];
    if constexpr (R % 2 == 0 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 2) {
        uint64_t pair;
        __builtin_memcpy(&pair, step->offset + r, sizeof pair);
        x[r] = reinterpret_cast<const Vec<T>*>(source + static_cast<uint32_t>(pair));
        x[r + 1] = reinterpret_cast<const Vec<T>*>(source + (pair >> 32));
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = reinterpret_cast<const Vec<T>*>(source + step->offset[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> w = splat<T>(step->weight[r]);
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) acc[r].v[v] += w * x[r][v];
    }
  }
  return step;
}

// Runs all blocks of a matrix over NV vectors per row. `finish.row(number, sums)` sees each row once, complete;
// `finish.pause()` is called after every kRowsPerSum rows and at the end. Sums of unfinished rows wait in the target.
inline constexpr int kRowsPerSum = 64;

template <class T, int NV, class Finish>
SF_INLINE void for_each_row(const RowArgs<T>& args, Finish& finish) {
  constexpr int R = rows_in_flight(NV);
  const char* const source = args.source;
  const int n_blocks = args.matrix.n_blocks, n_rows = args.matrix.n_rows;
  for (int b = 0; b < n_blocks; ++b) {
    const PackedBlock<T> block = args.matrix.blocks[b];
    const bool first = b == 0, last = b + 1 == n_blocks;
    const Step<T, R>* step = reinterpret_cast<const Step<T, R>*>(block.steps);
    for (int g = 0; g < block.groups; ++g) {
      const int32_t* rows = block.rows + g * R;
      Row<T, NV> acc[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) acc[r].v[v] = Vec<T>{};
      step = multiply_rows<T, NV, R>(step, block.counts[g], source, acc);
      if (!first) {
        for (int r = 0; r < R; ++r) {
          const Row<T, NV>* waiting = reinterpret_cast<const Row<T, NV>*>(args.target + rows[r] * args.target_stride);
          for (int v = 0; v < NV; ++v) acc[r].v[v] += waiting->v[v];
        }
      }
      if (last) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          if (rows[r] != n_rows) finish.row(rows[r], acc[r].v);
        if ((g + 1) * R % kRowsPerSum == 0) finish.pause();
      } else {
        for (int r = 0; r < R; ++r) *reinterpret_cast<Row<T, NV>*>(args.target + rows[r] * args.target_stride) = acc[r];
      }
    }
  }
  finish.pause();
}

// A sum over rows in two levels, so that its rounding grows with the square root of long sums at most.
template <class T, int NV>
struct Reduction {
  Vec<T>* total;
  Vec<T> part[NV] = {};
  SF_INLINE void add(int v, Vec<T> term) { part[v] += term; }
  SF_INLINE void pause() {
    for (int v = 0; v < NV; ++v) {
      total[v] += part[v];
      part[v] = Vec<T>{};
    }
  }
};

// Kernels without a sum have nothing to do at a pause.
template <class Row>
struct Rows {
  Row row;
  SF_INLINE void pause() {}
};
template <class Row>
Rows(Row) -> Rows<Row>;

template <class Row, class Sum>
struct RowsWithSum {
  Row row;
  Sum& sum;
  SF_INLINE void pause() { sum.pause(); }
};
template <class Row, class Sum>
RowsWithSum(Row, Sum&) -> RowsWithSum<Row, Sum>;

template <class T>
SF_INLINE const Vec<T>* at_row(const char* base, int row, ptrdiff_t stride) {
  return reinterpret_cast<const Vec<T>*>(base + row * stride);
}

// h = act(scale * (W source) + shift); what becomes of the slope is `store`.
template <class T, int NV, Activation A>
void affine(const RowArgs<T>& args) {
  const T a = args.a, b = args.b, inverse_a = args.inverse_a;
  const Store store = args.store;
  if (store == Store::kValue) {
    Rows rows{[&](int row, const Vec<T>* sum) {
      const T scale = args.scale[row], shift = args.shift[row];
      Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
      for (int v = 0; v < NV; ++v) {
        Vec<T> slope;
        activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], slope);
      }
    }};
    return for_each_row<T, NV>(args, rows);
  }
  Reduction<T, NV> reduction{reinterpret_cast<Vec<T>*>(args.reduce)};
  RowsWithSum rows{[&](int row, const Vec<T>* sum) {
    const T scale = args.scale[row], shift = args.shift[row];
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    Vec<T> slope[NV];
    for (int v = 0; v < NV; ++v) {
      activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], slope[v]);
      slope[v] *= scale;
    }
    if (store == Store::kValueSlope) {
      for (int v = 0; v < NV; ++v) out[NV + v] = slope[v];
      return;
    }
    const Vec<T>* seed = at_row<T>(args.seed, row, args.seed_stride);
    if (store == Store::kSeed) {
      for (int v = 0; v < NV; ++v) out[NV + v] = slope[v] * seed[v];
    } else {
      const Vec<T>* weight = at_row<T>(args.weight, row, args.weight_stride);
      for (int v = 0; v < NV; ++v) reduction.add(v, weight[v] * (slope[v] * seed[v]));
    }
  }, reduction};
  for_each_row<T, NV>(args, rows);
}

// The same with a tangent in slot 1 of every source row: one stream of weights serves both.
template <class T, int NV, Activation A>
void affine_tangent(const RowArgs<T>& args) {
  const T a = args.a, b = args.b, inverse_a = args.inverse_a;
  const bool store = args.store == Store::kTangent;
  Reduction<T, NV> reduction{reinterpret_cast<Vec<T>*>(args.reduce)};
  RowsWithSum rows{[&](int row, const Vec<T>* sum) {
    const T scale = args.scale[row], shift = args.shift[row];
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    Vec<T> tangent[NV];
    for (int v = 0; v < NV; ++v) {
      Vec<T> slope;
      activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], slope);
      tangent[v] = slope * (scale * sum[NV + v]);
    }
    if (store) {
      for (int v = 0; v < NV; ++v) out[NV + v] = tangent[v];
    } else {
      const Vec<T>* weight = at_row<T>(args.weight, row, args.weight_stride);
      for (int v = 0; v < NV; ++v) reduction.add(v, weight[v] * tangent[v]);
    }
  }, reduction};
  for_each_row<T, 2 * NV>(args, rows);
}

// target[row] = factor[row, or factor_row[row]] * (W source) + addend[row]; if second, slot 1 = factor2[...] * (W source)
template <class T, int NV>
void product(const RowArgs<T>& args) {
  char* const target = args.target;
  const ptrdiff_t stride = args.target_stride;
  if (args.factor == nullptr && args.addend == nullptr && !args.second) {
    Rows rows{[=](int row, const Vec<T>* sum) {
      Vec<T>* const out = reinterpret_cast<Vec<T>*>(target + row * stride);
      for (int v = 0; v < NV; ++v) out[v] = sum[v];
    }};
    return for_each_row<T, NV>(args, rows);
  }
  Rows rows{[=, &args](int row, const Vec<T>* sum) {
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(target + row * stride);
    Vec<T> first[NV];
    for (int v = 0; v < NV; ++v) first[v] = sum[v];
    if (args.factor) {
      const Vec<T>* f = at_row<T>(args.factor, args.factor_row ? args.factor_row[row] : row, args.factor_stride);
      for (int v = 0; v < NV; ++v) first[v] *= f[v];
    }
    if (args.addend) {
      const Vec<T>* more = at_row<T>(args.addend, row, args.addend_stride);
      for (int v = 0; v < NV; ++v) first[v] += more[v];
    }
    if (args.second) {
      if (args.factor2) {
        const Vec<T>* f = at_row<T>(args.factor2, args.factor2_row ? args.factor2_row[row] : row, args.factor2_stride);
        for (int v = 0; v < NV; ++v) out[NV + v] = f[v] * sum[v];
      } else {
        for (int v = 0; v < NV; ++v) out[NV + v] = sum[v];
      }
    }
    for (int v = 0; v < NV; ++v) out[v] = first[v];
  }};
  for_each_row<T, NV>(args, rows);
}

// reduce += coefficient[row] * factor[row] * factor2[row] * (W source), summed over rows; a target is needed only where
// the matrix is cut into blocks.
template <class T, int NV>
void reduction(const RowArgs<T>& args) {
  Reduction<T, NV> sum_of_rows{reinterpret_cast<Vec<T>*>(args.reduce)};
  RowsWithSum rows{[&](int row, const Vec<T>* sum) {
    Vec<T> term[NV];
    for (int v = 0; v < NV; ++v) term[v] = sum[v];
    if (args.factor) {
      const Vec<T>* f = at_row<T>(args.factor, args.factor_row ? args.factor_row[row] : row, args.factor_stride);
      for (int v = 0; v < NV; ++v) term[v] *= f[v];
    }
    if (args.factor2) {
      const Vec<T>* f = at_row<T>(args.factor2, args.factor2_row ? args.factor2_row[row] : row, args.factor2_stride);
      for (int v = 0; v < NV; ++v) term[v] *= f[v];
    }
    if (args.coefficient) {
      for (int v = 0; v < NV; ++v) term[v] *= args.coefficient[row];
    }
    for (int v = 0; v < NV; ++v) sum_of_rows.add(v, term[v]);
  }, sum_of_rows};
  for_each_row<T, NV>(args, rows);
}

}  // namespace sparseflow::SPARSEFLOW_ISA
