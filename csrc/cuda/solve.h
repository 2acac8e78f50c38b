// What a solve and an evaluation on a GPU are told, and what they say: plain numbers and addresses in device memory.
#pragma once

#include "../step_control.h"
#include "device_program.h"

namespace sparseflow::cuda {

inline constexpr int kMaxComponents = 8;         // of a state, the log-density among them
inline constexpr int kSums = 2 * kMaxComponents + 1;  // numbers that blocks add up together

enum class Control : int { kShared = 0, kPerTile = 1 };
enum class Status : int { kOk = 0, kUnderflow = 1, kNonFinite = 2, kMaxNumSteps = 3, kInterrupted = 4 };

// Of a solve, or of one tile that steps on its own.
struct SolveStats {
  double nfe = 0, accepted = 0, rejected = 0, status = 0, t = 0, dt = 0, barriers = 0, reserved = 0;
};

template <class T>
struct SolveParams {
  DeviceProgram program;
  BlockPlan plan;
  int32_t batch = 0, tiles = 0;
  const T *x = nullptr, *l = nullptr, *noise = nullptr;  // [batch][dim], [batch], [batch][dim]
  const T* context = nullptr;                            // [batch][program.context_rows]
  char* global = nullptr;                                // [blocks][plan.global_bytes]

  // one evaluation: f [batch][dim], trace [batch] or null, at *time or, without one, at time_value
  bool evaluate = false;
  T *f = nullptr, *f_trace = nullptr;
  const T* time = nullptr;
  T time_value = 0;
  bool own_times = false;  // the time of every sample is a last column of x

  // a solve
  Control control = Control::kShared;
  DeviceTableau tableau;
  // Components of the state, rows [bound, next bound), each with tolerances and a norm of its own; the log-density is one.
  int32_t components = 0, bounds[kMaxComponents + 1] = {};
  double rtol[kMaxComponents] = {}, atol[kMaxComponents] = {};
  StepRule rule;
  double first_step = 0;  // NaN: choose
  int32_t sign = 1, perturb = 0;
  int32_t n_times = 0, n_grid = 0, n_step_t = 0, n_jump_t = 0;
  const double* times = nullptr;  // the outputs', then grid, step_t, jump_t
  T *xs = nullptr, *ls = nullptr;
  T* tile_state = nullptr;  // [tiles][5][dim + divergence][S], where a block has several tiles
  double* blame = nullptr;  // [2][batch]: sums of squares of the last error, or NaN
  SolveStats* stats = nullptr;  // one, or one per tile
  double* slots = nullptr;               // [2][kSums][blocks]
  unsigned long long* barrier = nullptr;  // zero at the start
  int* next_tile = nullptr;               // zero at the start
  const int* stop = nullptr;              // zero; the host may write another number, and the solve ends

  // (t, dt) of accepted steps, and with `record` what a gradient needs of them; a longer solve goes on without
  int32_t step_capacity = 0;
  double* steps = nullptr;  // [step_capacity][2]; null: not wanted
  bool record = false;
  int32_t capacity = 0;
  T *states = nullptr, *derivatives = nullptr;  // [capacity + 1][batch][dim]; of the first stage of every step
  T *x_slopes = nullptr, *l_slopes = nullptr;   // [times][batch][dim], [times][batch]

  void add_component(int rows, double relative, double absolute) {
    rtol[components] = relative, atol[components] = absolute;
    bounds[components + 1] = bounds[components] + rows;
    ++components;
  }
};

// Where a step's weights begin: a, then b, b_mid, b_error.
inline constexpr int kWeightsB = kMaxStages * (kMaxStages - 1) / 2, kWeightsMid = kWeightsB + kMaxStages, kWeightsError = kWeightsMid + kMaxStages,
                     kWeights = kWeightsError + kMaxStages;

// What a block does next with its tiles.
enum class Pass : int {
  kEvaluation,  // of the field, and nothing else
  kLoad,        // the first state, for a grid
  kStart,       // that, and its derivative
  kTrial,       // a derivative to choose the first step's size by
  kStep,        // of an adaptive method
  kCount,       // samples that are not finite
  kJump,        // the derivative anew, at t0
  kGrid,        // a step of a fixed grid
  kDone
};
struct Task {
  Pass pass;
  int stages, measures, sums;  // evaluations of a tile, norms of it, totals that the blocks add up then
  int with_mid;                // outputs will be read off the step
  double t0, dt, t1;
};

// What a block knows in common, in shared memory behind the trace and the threads' parts of error norms.
template <class T>
struct Common {
  double totals[kSums];      // of the tile, the block, then of all blocks
  Task task;
  int turn;                  // which of y0, y1 (f0, f1) is the old one
  int index;                 // of the next output
  int checked, all_finite;   // whether anybody looked at it, and what was found
  int jump;                  // the last step ended at one
  int moved, first_output, last_output;  // a step was accepted; outputs that are known since
  Status status;
  int next_tile;
  double nfe, accepted, rejected, h0, d1;
  unsigned long long barriers;
  StepController control;
  T weights[kWeights];       // of the stages in a step of the present size
};

}  // namespace sparseflow::cuda
