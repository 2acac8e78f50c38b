// What a backward pass on a GPU is told: plain numbers and addresses in device memory.
#pragma once

#include "device_program.h"

namespace sparseflow::cuda {

template <class T>
struct AdjointParams {
  DeviceProgram program;
  BlockPlan plan;
  int32_t batch = 0, tiles = 0;
  const T *x = nullptr, *noise = nullptr;  // [batch][dim]; x of an evaluation
  const T* context = nullptr;              // [batch][program.context_rows]
  T* grad_context = nullptr;               // the same, zero at the start; null: not wanted
  char* global = nullptr;                  // [blocks][plan.global_bytes]
  T* sums = nullptr;  // [blocks][lasting sums, then totals], zero at the start: added up by whoever asked
  T* stage_sums = nullptr;  // [blocks][stage sums], zero at the start

  // of an evaluation, at *time or, without one, at time_value
  bool evaluate = false;
  const T *grad_f = nullptr, *grad_trace = nullptr;
  const T* time = nullptr;
  T time_value = 0;
  bool own_times = false;  // the time of every sample is a last column of x, its gradient goes to grad_times
  T* grad_times = nullptr;  // [batch]

  // of a solve: what it recorded (csrc/cuda/solve.h)
  DeviceTableau tableau;
  int32_t sign = 1, perturb = 0, n_times = 0, n_steps = 0;
  const double *times = nullptr, *steps = nullptr;
  const T *states = nullptr, *derivatives = nullptr;
  const T *grad_xs = nullptr, *grad_ls = nullptr;

  T *grad_x = nullptr, *grad_l = nullptr;
};

}  // namespace sparseflow::cuda
