// The sparse kernels: rows of (sparse matrix) x (tile), with whatever follows a row fused behind it.
//
// A group of rows_in_flight rows of like length runs at once, each with its own accumulators, which hides the latency
// of the multiply-add; per entry one broadcast weight meets one activation row of the tile. The bits of a sample do not
// depend on the tile width, on its place in the tile or on the rows in flight: every row is one chain of
// multiply-adds in column order, and sums over rows follow one fixed order.
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

// Runs all blocks of a matrix over NV vectors per row; `finish(row, sums)` sees each row once, complete. Sums of
// unfinished rows wait in the target.
template <class T, int NV, class Finish>
SF_INLINE void for_each_row(const RowArgs<T>& args, Finish finish) {
  constexpr int R = rows_in_flight(NV);
  for (int b = 0; b < args.matrix.n_blocks; ++b) {
    const PackedBlock<T>& block = args.matrix.blocks[b];
    const bool first = b == 0, last = b + 1 == args.matrix.n_blocks;
    const Step<T, R>* step = reinterpret_cast<const Step<T, R>*>(block.steps);
    for (int g = 0; g < block.groups; ++g) {
      const int32_t* rows = block.rows + g * R;
      Row<T, NV> acc[R];
      if (first) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
          for (int v = 0; v < NV; ++v) acc[r].v[v] = Vec<T>{};
      } else {
        for (int r = 0; r < R; ++r) acc[r] = *reinterpret_cast<const Row<T, NV>*>(args.target + rows[r] * args.target_stride);
      }
      step = multiply_rows<T, NV, R>(step, block.counts[g], args.source, acc);
      if (last) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) finish(rows[r], acc[r].v);
      } else {
        for (int r = 0; r < R; ++r) *reinterpret_cast<Row<T, NV>*>(args.target + rows[r] * args.target_stride) = acc[r];
      }
    }
  }
}

template <class T>
SF_INLINE const Vec<T>* at_row(const char* base, int row, ptrdiff_t stride) {
  return reinterpret_cast<const Vec<T>*>(base + row * stride);
}

// h = act(scale * (W source) + shift); what becomes of the slope is `store`.
template <class T, int NV, Activation A>
void affine(const RowArgs<T>& args) {
  const T a = args.a, b = args.b, inverse_a = args.inverse_a;
  Vec<T>* const reduce = reinterpret_cast<Vec<T>*>(args.reduce);
  const Store store = args.store;
  for_each_row<T, NV>(args, [&](int row, const Vec<T>* sum) {
    const T scale = args.scale[row], shift = args.shift[row];
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    if (store == Store::kValue) {
      for (int v = 0; v < NV; ++v) {
        Vec<T> slope;
        activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], slope);
      }
      return;
    }
    Vec<T> slope[NV];
    for (int v = 0; v < NV; ++v) {
      activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], slope[v]);
      slope[v] *= scale;
    }
    if (store == Store::kValueSlope) {
      for (int v = 0; v < NV; ++v) out[NV + v] = slope[v];
    } else if (store == Store::kSeed) {
      const Vec<T>* seed = at_row<T>(args.seed, row, args.seed_stride);
      for (int v = 0; v < NV; ++v) out[NV + v] = slope[v] * seed[v];
    } else {
      const Vec<T>* seed = at_row<T>(args.seed, row, args.seed_stride);
      const Vec<T>* weight = at_row<T>(args.weight, row, args.weight_stride);
      for (int v = 0; v < NV; ++v) reduce[v] += weight[v] * (slope[v] * seed[v]);
    }
  });
}

// The same with a tangent in slot 1 of every source row: one stream of weights serves both.
template <class T, int NV, Activation A>
void affine_tangent(const RowArgs<T>& args) {
  const T a = args.a, b = args.b, inverse_a = args.inverse_a;
  Vec<T>* const reduce = reinterpret_cast<Vec<T>*>(args.reduce);
  const bool store = args.store == Store::kTangent;
  for_each_row<T, 2 * NV>(args, [&](int row, const Vec<T>* sum) {
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
      for (int v = 0; v < NV; ++v) reduce[v] += weight[v] * tangent[v];
    }
  });
}

// target[row] = factor[row, or factor_row[row]] * (W source)
template <class T, int NV>
void product(const RowArgs<T>& args) {
  for_each_row<T, NV>(args, [&](int row, const Vec<T>* sum) {
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    if (args.factor) {
      const Vec<T>* factor = at_row<T>(args.factor, args.factor_row ? args.factor_row[row] : row, args.factor_stride);
      for (int v = 0; v < NV; ++v) out[v] = factor[v] * sum[v];
    } else {
      for (int v = 0; v < NV; ++v) out[v] = sum[v];
    }
  });
}

// reduce += coefficient[row] * factor[row] * factor2[row] * (W source), summed over rows; a target is needed only where
// the matrix is cut into blocks.
template <class T, int NV>
void reduction(const RowArgs<T>& args) {
  Vec<T>* const reduce = reinterpret_cast<Vec<T>*>(args.reduce);
  for_each_row<T, NV>(args, [&](int row, const Vec<T>* sum) {
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
    for (int v = 0; v < NV; ++v) reduce[v] += term[v];
  });
}

}  // namespace sparseflow::SPARSEFLOW_ISA
