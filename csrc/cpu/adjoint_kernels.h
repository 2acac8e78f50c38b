// The kernels of a backward pass: the forward layer once more, keeping what its adjoint needs; the adjoint of a layer, a
// transposed sparse product with the chain rule behind it; and the gradient of the weights, an inner product over the
// samples for every entry of the pattern.
#pragma once

#include <utility>

#include "row_kernels.h"

namespace sparseflow::SPARSEFLOW_ISA {

// Keeps, in successive slots of a row: d = scale act'; if wanted c = scale^2 act'', or e = c q where a tangent q is carried;
// if wanted r = W source.
template <class T, int NV, Activation A, bool Tangent>
void keep(const RowArgs<T>& args) {
  const T a = args.a, b = args.b, inverse_a = args.inverse_a;
  const bool slopes = args.slopes, curvature = args.curvature && slopes, raw = args.raw;
  Rows rows{[&](int row, const Vec<T>* sum) {
    const T scale = args.scale[row], shift = args.shift[row];
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    Vec<T>* kept = reinterpret_cast<Vec<T>*>(args.kept + row * args.kept_stride);
    Vec<T> d[NV], bend[NV];
    for (int v = 0; v < NV; ++v) {
      activate<T, A>(sum[v] * scale + shift, a, b, inverse_a, out[v], d[v], bend[v]);
      d[v] *= scale;
      bend[v] *= scale * scale;
      if constexpr (Tangent) {
        out[NV + v] = d[v] * sum[NV + v];
        bend[v] *= sum[NV + v];
      }
    }
    if (slopes) {
      for (int v = 0; v < NV; ++v) kept[v] = d[v];
      kept += NV;
    }
    if (curvature) {
      for (int v = 0; v < NV; ++v) kept[v] = bend[v];
      kept += NV;
    }
    if (raw)
      for (int v = 0; v < NV; ++v) kept[v] = sum[v];
  }};
  for_each_row<T, Tangent ? 2 * NV : NV>(args, rows);
}

// The slope d of a layer with value h, and (act'' / act') scale, by which its tangent p becomes e: torch's own formulas.
template <class T, SlopeFrom From>
SF_INLINE void slope_of_value(Vec<T> h, T scale, Vec<T>& d, Vec<T>& bend) {
  if constexpr (From == SlopeFrom::kTanh) {
    d = scale * (T(1) - h * h);
    bend = (T(-2) * scale) * h;
  } else if constexpr (From == SlopeFrom::kSigmoid) {
    d = scale * (h * (T(1) - h));
    bend = scale * (T(1) - (h + h));
  } else {
    d = splat<T>(scale);
    bend = Vec<T>{};
  }
}

// From the cotangents hbar (and pbar) of a layer's value (and tangent), the cotangent of its r = W h (and of its tangent's).
template <class T, int NV, SlopeFrom From, bool Tangent>
void pull(const RowArgs<T>& args) {
  constexpr bool kKept = From == SlopeFrom::kKept;
  const bool raw = args.raw;
  const int r_slot = kKept ? (args.curvature ? 2 : 1) : 0;
  constexpr int kSums = Tangent ? 2 * NV : NV;
  Rows rows{[&](int row, const Vec<T>* sum) {
    Vec<T>* const out = reinterpret_cast<Vec<T>*>(args.target + row * args.target_stride);
    const Vec<T>* const kept = at_row<T>(args.kept, row, args.kept_stride);
    const Vec<T>* const h = at_row<T>(args.value, row, args.value_stride);  // and its tangent in slot 1
    Vec<T> cotangent[kSums];
    for (int v = 0; v < kSums; ++v) cotangent[v] = sum[v];
    if (args.addend) {
      const Vec<T>* more = at_row<T>(args.addend, row, args.addend_stride);
      for (int v = 0; v < kSums; ++v) cotangent[v] += more[v];
    }
    Vec<T> d[NV], e[NV];
    for (int v = 0; v < NV; ++v) {
      if constexpr (kKept) {
        d[v] = kept[v];
        if constexpr (Tangent) e[v] = kept[NV + v];
      } else {
        slope_of_value<T, From>(h[v], args.scale[row], d[v], e[v]);
        if constexpr (Tangent) e[v] *= h[NV + v];
      }
    }
    Vec<T> u[NV];
    for (int v = 0; v < NV; ++v) u[v] = cotangent[v] * d[v];
    if constexpr (Tangent) {
      for (int v = 0; v < NV; ++v) {
        u[v] += cotangent[NV + v] * e[v];
        out[NV + v] = cotangent[NV + v] * d[v];
      }
    }
    const Vec<T>* dbar = nullptr;
    if constexpr (kKept && !Tangent) {
      if (args.slope_cotangent) {
        dbar = at_row<T>(args.slope_cotangent, row, args.slope_cotangent_stride);
        for (int v = 0; v < NV; ++v) u[v] += dbar[v] * kept[NV + v];
      }
    }
    for (int v = 0; v < NV; ++v) out[v] = u[v];
    if (raw) {
      const Vec<T>* const r = kept + r_slot * NV;
      Vec<T>* const gate = out + kSums;
      for (int v = 0; v < NV; ++v) gate[v] = u[v] * r[v];
      if constexpr (Tangent) {
        for (int v = 0; v < NV; ++v) gate[v] += cotangent[NV + v] * h[NV + v];
      } else if (dbar) {
        for (int v = 0; v < NV; ++v) gate[v] += dbar[v] * d[v];
      }
    }
  }};
  for_each_row<T, kSums>(args, rows);
}

// The lanes of kLanes vectors summed up, into one vector in their order: at each level pairs of vectors fold their groups
// of lanes in half, side by side.
template <class T, int Group, int... I>
SF_INLINE Vec<T> fold(Vec<T> x, Vec<T> y, std::integer_sequence<int, I...>) {
  constexpr int L = Simd<T>::kLanes, H = Group / 2;
  const Vec<T> stay = __builtin_shufflevector(x, y, (I % Group < H ? I : L + I)...);  // a blend
  const Vec<T> cross = __builtin_shufflevector(x, y, (I % Group < H ? I + H : L + I - H)...);
  return stay + cross;
}
template <class T, int Group>
SF_INLINE void fold_all(Vec<T>* x) {  // Group vectors
  constexpr int L = Simd<T>::kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < Group / 2; ++i) x[i] = fold<T, Group>(x[i], x[i + Group / 2], std::make_integer_sequence<int, L>{});
  if constexpr (Group > 2) fold_all<T, Group / 2>(x);
}

// The dense blocks of a gradient: as many rows as columns (or twice as many) of products in registers, each operand loaded
// once for all of them. Every sum has the bits it has in a run.
template <class T, int NV>
SF_INLINE T* dense_gradient(const GradientArgs<T>& args) {
  constexpr int L = Simd<T>::kLanes, H = gradient_block_rows(L), W = L / H;
  const uint32_t* offset = args.dense;
  T* sums = args.sums;
  for (int block = 0; block < args.dense_blocks; ++block, sums += L) {
    const Vec<T> *left[H], *right[W];
#pragma GCC unroll 4
    for (int r = 0; r < H; ++r) left[r] = reinterpret_cast<const Vec<T>*>(args.workspace + *offset++);
#pragma GCC unroll 4
    for (int c = 0; c < W; ++c) right[c] = reinterpret_cast<const Vec<T>*>(args.workspace + *offset++);
    Vec<T> sum[L];
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) {
      Vec<T> y[W];
#pragma GCC unroll 4
      for (int c = 0; c < W; ++c) y[c] = right[c][v];
#pragma GCC unroll 4
      for (int r = 0; r < H; ++r) {
        const Vec<T> x = left[r][v];
#pragma GCC unroll 4
        for (int c = 0; c < W; ++c) {
          if (v == 0) sum[r * W + c] = x * y[c];
          else sum[r * W + c] += x * y[c];
        }
      }
    }
    fold_all<T, L>(sum);
    *reinterpret_cast<Vec<T>*>(sums) += sum[0];
  }
  return sums;
}

// NV vectors per operand: a tile's samples, or twice as many where values and tangents lie side by side.
template <class T, int NV>
void gradient(const GradientArgs<T>& args) {
  constexpr int L = Simd<T>::kLanes;
  static_assert(kGradientBatch % L == 0);
  const char* const workspace = args.workspace;
  const GradientRun* run = args.runs;
  const uint32_t* right = args.right;
  T* sums = dense_gradient<T, NV>(args);
  Vec<T> partial[kGradientBatch];
  for (int batch = 0; batch < args.batches; ++batch, sums += kGradientBatch) {
    Vec<T>* out = partial;
    for (const GradientRun* const last = run + args.runs_of_batch[batch]; run != last; ++run) {
      const Vec<T>* const left = reinterpret_cast<const Vec<T>*>(workspace + run->left);
      Vec<T> x[NV];
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) x[v] = left[v];
      for (int k = run->count; k > 0; --k, ++right, ++out) {
        const Vec<T>* const y = reinterpret_cast<const Vec<T>*>(workspace + *right);
        Vec<T> sum = x[0] * y[0];
#pragma GCC unroll 12
        for (int v = 1; v < NV; ++v) sum += x[v] * y[v];
        *out = sum;
      }
    }
    for (; out != partial + kGradientBatch; ++out) *out = Vec<T>{};  // the last batch
    for (int group = 0; group < kGradientBatch; group += L) {
      Vec<T> x[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) x[i] = partial[group + i];
      fold_all<T, L>(x);
      *reinterpret_cast<Vec<T>*>(sums + group) += x[0];
    }
  }
}

}  // namespace sparseflow::SPARSEFLOW_ISA
