// The activations every native engine knows. Numbers are shared with sparseflow_kernels/activations.py.
#pragma once

namespace sparseflow {

enum class Activation : int {
  kIdentity = 0,
  kTanh = 1,
  kSigmoid = 2,
  kSoftplus = 3,  // parameters: beta, threshold
  kRelu = 4,
  kElu = 5,  // parameter: alpha
  kSilu = 6,
  kSin = 7,
  kSquare = 8,
  kCube = 9,
  kGelu = 10,  // by the error function
};
inline constexpr int kActivations = 11;

struct ActivationParams {
  double a = 1.0;  // softplus beta, elu alpha
  double b = 20.0;  // softplus threshold
};

}  // namespace sparseflow
