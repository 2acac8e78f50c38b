// The sparse kernels: rows of (sparse matrix) x (tile), with whatever follows a row fused behind it.
//
// A group of rows_in_flight rows of like length runs at once, each with its own accumulators, which hides the latency
// of the multiply-add; per entry one broadcast weight meets one activation row of the tile. That takes a load for every
// multiply-add. Where most entries are there, a dense group of rows loads each activation once for all of them.
//
// The bits of a sample do not depend on the tile width, on its place in the tile or on the rows of a group: within a block
// of columns every row is one chain of multiply-adds in column order (the zeros a dense group is filled up with change no
// finite sum), and blocks and sums over rows follow one fixed order.
#pragma once

#include "kernels.h"
#include "plane_kernels.h"
#include "vector_math.h"

namespace sparseflow::SPARSEFLOW_ISA {

// Accumulators are rows x vectors; eight or more chains cover the latency, and 16 registers must hold them (32 with AVX-512).
constexpr int rows_in_flight(int vectors) {
  return vectors <= 2 ? 4 : vectors <= 6 ? 2 : (kVectorBytes == 64 && vectors <= 8) ? 2 : 1;
}

// Rows of a dense group: as many as leave registers for the operands of a step, weights or activations, whichever are
// fewer, and one of the others. 0: not even two.
constexpr int dense_rows(int vectors) {
  for (int rows = 8; rows > 1; rows /= 2)
    if (rows * vectors + (rows < vectors ? rows : vectors) + 1 <= kRegisters) return rows;
  return 0;
}

// The sums of a group, from its steps; the next group's begin where the result says.
template <class T, int NV, int R>
SF_INLINE const char* multiply_rows(const char* steps, int count, const char* source, Row<T, NV> (&acc)[R]) {
  static_assert(sizeof(Step<T, R>) == step_bytes<T>(R));
  const Step<T, R>* step = reinterpret_cast<const Step<T, R>*>(steps);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) acc[r].v[v] = Vec<T>{};
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
  return reinterpret_cast<const char*>(step);
}

// Not inlined, so that all kernels share it; one call serves many columns, and the way of the sums through memory is short.
template <class T, int NV, int R>
__attribute__((noinline)) const char* multiply_dense(const char* steps, int count, const char* source, Row<T, NV>* sums) {
  static_assert(sizeof(DenseStep<T, R>) == dense_step_bytes<T>(R));
  const DenseStep<T, R>* step = reinterpret_cast<const DenseStep<T, R>*>(steps);
  Row<T, NV> acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) acc[r].v[v] = Vec<T>{};
  for (int k = 0; k < count; ++k, ++step) {
    const Vec<T>* const x = reinterpret_cast<const Vec<T>*>(source + step->offset);
    if constexpr (R < NV) {  // the fewer operands stay in registers, the others come one by one
      Vec<T> w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = splat<T>(step->weight[r]);
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) {
        Vec<T> activation = x[v];
        keep_in_register(activation);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r].v[v] += w[r] * activation;
      }
    } else {
      Vec<T> activation[NV];
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) activation[v] = x[v];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> w = splat<T>(step->weight[r]);
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) acc[r].v[v] += w * activation[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = acc[r];
  return reinterpret_cast<const char*>(step);
}

// Runs all blocks of a matrix over NV vectors per row. `finish.row(number, sums)` sees each row once, complete;
// `finish.pause()` is called after every kRowsPerSum rows and at the end. Sums of unfinished rows wait in the target.
inline constexpr int kRowsPerSum = 64;

template <class T, int NV, bool Planes = false, class Finish>
SF_INLINE void for_each_row(const RowArgs<T>& args, Finish& finish) {
  if constexpr (Planes) return for_each_pixel<T, NV>(args, finish);
  constexpr bool kDense = dense_rows(NV) > 0;
  constexpr int R = rows_in_flight(NV), D = kDense ? dense_rows(NV) : R;
  static_assert(kRowsPerSum % R == 0 && D % R == 0);
  const char* const source = args.source;
  const int n_blocks = args.matrix.n_blocks, n_rows = args.matrix.n_rows;
  for (int b = 0; b < n_blocks; ++b) {
    const PackedBlock<T> block = args.matrix.blocks[b];
    const bool first = b == 0, last = b + 1 == n_blocks;
    const char* steps = block.steps;
    const int32_t* count = block.counts;
    Row<T, NV> ahead[D];  // the sums of a dense group, whose rows are finished R at a time like all others
    for (int g = 0; g < block.groups; ++g) {
      const int32_t* rows = block.rows + g * R;
      Row<T, NV> acc[R];
      if (kDense && block.dense) {
        if (g * R % D == 0) steps = multiply_dense<T, NV, D>(steps, *count++, source, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = ahead[g * R % D + r];
      } else {
        steps = multiply_rows<T, NV, R>(steps, *count++, source, acc);
      }
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
        for (int r = 0; r < R; ++r)  // a padded row's would be those of whatever lies behind the target
          if (rows[r] != n_rows) *reinterpret_cast<Row<T, NV>*>(args.target + rows[r] * args.target_stride) = acc[r];
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
template <class T, int NV, Activation A, bool Planes>
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
    return for_each_row<T, NV, Planes>(args, rows);
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
  for_each_row<T, NV, Planes>(args, rows);
}

// The same with a tangent in slot 1 of every source row: one stream of weights serves both.
template <class T, int NV, Activation A, bool Planes>
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
  for_each_row<T, 2 * NV, Planes>(args, rows);
}

// target[row] = factor[row, or factor_row[row]] * (W source) + addend[row]; if second, slot 1 = factor2[...] * (W source)
template <class T, int NV, bool Planes>
void product(const RowArgs<T>& args) {
  char* const target = args.target;
  const ptrdiff_t stride = args.target_stride;
  if (args.factor == nullptr && args.addend == nullptr && !args.second) {
    Rows rows{[=](int row, const Vec<T>* sum) {
      Vec<T>* const out = reinterpret_cast<Vec<T>*>(target + row * stride);
      for (int v = 0; v < NV; ++v) out[v] = sum[v];
    }};
    return for_each_row<T, NV, Planes>(args, rows);
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
  for_each_row<T, NV, Planes>(args, rows);
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
