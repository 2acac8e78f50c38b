// The operations of a program, as every native engine runs them. No functions here.
#pragma once

namespace sparseflow {

// affine     target = act(scale * (W source) + shift), and what `store` says of its slope
// product    target = factor * (W source) + addend; if `second`, slot 1 = factor2 * (W source)
// reduction  the trace += coefficient * factor * factor2 * (W source), summed over rows
// keep       an affine that keeps for its adjoint d = scale act', then c = scale^2 act'' (carrying a tangent q: e = c q),
//            then r = W source, each if wanted, in the slots of `kept`
//            (where `slope_from` says so d and e follow from the value and its tangent, and are not kept)
// pull       the adjoint of a keep: from the cotangents W source (+ addend) of its value h (and its tangent), the cotangent
//            u = d hbar + c dbar of r (with a tangent: u = d hbar + e pbar and d pbar); then, with r, the term of gate_sum
// gradient   sums[sum] += over samples of factor[row] * source[column], at the entries of W
// pointwise  outputs = an expression of inputs and row vectors, row by row; an output without a buffer is added to the trace;
//            totals = places of the expression, summed over rows
enum class OpKind : int { kAffine = 0, kProduct = 1, kReduction = 2, kKeep = 3, kPull = 4, kGradient = 5, kPointwise = 6 };

enum class Store : int {
  kValue = 0,        // h
  kValueSlope = 1,   // h and, in slot 1, s * act'(z)
  kSeed = 2,         // h and, in slot 1, the tangent s * act'(z) * seed[row]
  kSeedReduce = 3,   // h, and reduce += weight[row] * s * act'(z) * seed[row]
  kTangent = 4,      // input carries a tangent: h and s * act'(z) * (W p)
  kTangentReduce = 5 // input carries a tangent: h, and reduce += weight[row] * s * act'(z) * (W p)
};

// Where a pull takes a layer's slope and curvature from: what was kept, or the value h itself, by the layer's activation.
enum class SlopeFrom : int { kKept = 0, kIdentity = 1, kTanh = 2, kSigmoid = 3 };
inline constexpr int kSlopesFrom = 4;

inline constexpr int kMostTotals = 15;  // of a pointwise operation

}  // namespace sparseflow
