// Evaluations and whole adaptive solves of a program over a batch, tile by tile.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../step_control.h"
#include "../tableau.h"
#include "pack.h"
#include "thread_pool.h"
#include "time_source.h"

namespace sparseflow {

template <class T>
struct SolveInput {
  int batch = 0;
  const T* x = nullptr;      // [batch, dim]
  const T* l = nullptr;      // [batch], with a divergence
  const T* noise = nullptr;  // [batch, dim], if the program has a noise buffer
  const T* context = nullptr;  // [batch, context rows], if the program has a context
  std::vector<double> times;  // ascending
  int sign = 1;               // the field is sign * f(sign * t, y)
  Tableau tableau;
  // The components of the state, whose errors are normed apart: so many rows each (empty: it is one), and with a divergence
  // the log-density behind them. Tolerances: one for each component.
  std::vector<int> parts;
  std::vector<double> rtol, atol;
  StepOptions options;
  std::vector<double> grid;  // fixed methods
  bool perturb = false;
  bool per_tile = false;
  bool record = false;         // keep what a gradient needs
  bool record_stages = false;  // and what spares it to evaluate the stages again
  int threads = 1;
};

// What is written before it is read need not be filled first: that takes as long as writing it, on one thread.
template <class T>
struct Unfilled : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = Unfilled<U>;
  };
  template <class U>
  void construct(U* at) {
    ::new (static_cast<void*>(at)) U;
  }
};
template <class T>
using Record = std::vector<T, Unfilled<T>>;

template <class T>
struct SolveOutput {
  long long nfe = 0, accepted = 0, rejected = 0;
  std::vector<std::pair<double, double>> steps;
  std::string status = "ok";
  double t = 0, dt = 0;
  std::vector<int> rows;
  // With `record`: x at the ends of the steps, [accepted + 1][batch][dim]; the first derivatives of every stage of theirs
  // that were kept, [accepted + 1][kept][batch][dim], where the last ones stand for no step; and, of an adaptive method,
  // dx/dt and dl/dt of what was read off at the outputs, [times][batch][dim] and [times][batch], zero at the first one.
  Record<T> states, derivatives;
  std::vector<T> x_slopes, l_slopes;
};

template <class T>
class CompiledProgram {
 public:
  CompiledProgram(Program<T> program, const Kernels<T>& kernels);

  const Program<T>& program() const { return program_; }
  // New numbers for the same program (pack.h), no solve running.
  void set_values(int matrix, std::vector<T> values) {
    const Exclusive::Hold held(one_caller_);
    sparseflow::set_values(program_, matrix, std::move(values));
    if (program_.matrices[matrix].dynamic()) return;
    for (auto& entry : packed_)
      if (entry.second) reweave(program_, *entry.second, matrix);
  }
  void set_modulation(int modulation, std::vector<T> bias, std::vector<T> gate_slope, std::vector<T> gate_offset, std::vector<T> shift_slope,
                      std::vector<T> shift_offset) {
    const Exclusive::Hold held(one_caller_);
    sparseflow::set_modulation(program_, modulation, std::move(bias), std::move(gate_slope), std::move(gate_offset), std::move(shift_slope),
                               std::move(shift_offset));
  }
  void set_vector(int vector, std::vector<T> values) {
    const Exclusive::Hold held(one_caller_);
    sparseflow::set_vector(program_, vector, std::move(values));
  }
  void set_refresh(RefreshCallback<T> refresh) {
    const Exclusive::Hold held(one_caller_);
    time_.set_refresh(std::move(refresh));
  }
  void set_time(std::shared_ptr<CompiledProgram<T>> time) {
    const Exclusive::Hold held(one_caller_);
    time_.set_time(program_, std::move(time));
  }

  // f [batch, out] and, if asked for, the trace [batch] at one time; noise may be null where the trace is not asked for
  void evaluate(double t, const T* x, const T* noise, int batch, int threads, T* f, T* trace, const T* context = nullptr);

  // xs [times, batch, dim], ls [times, batch]
  SolveOutput<T> solve(const SolveInput<T>& input, T* xs, T* ls);

  // Seconds per evaluation of one tile, for every width.
  std::vector<double> tile_seconds() {
    const Exclusive::Hold held(one_caller_);
    return seconds();
  }
  int width(int index) const { return kernels_.lanes * kernels_.vectors[index]; }
  void force_width(int index) {  // -1: by the clock
    if (index < -1 || index >= Kernels<T>::kWidths) throw std::invalid_argument("force_width: no such width: index is " + std::to_string(index));
    const Exclusive::Hold held(one_caller_);
    forced_ = index;
  }
  size_t workspace_bytes(int width_index) {
    if (width_index < 0 || width_index >= Kernels<T>::kWidths)
      throw std::invalid_argument("workspace_bytes: no such width: width_index is " + std::to_string(width_index));
    const Exclusive::Hold held(one_caller_);
    return packed(width_index).workspace_bytes;
  }

 private:
  template <class U>
  friend class Integration;

  // Who calls these holds the program.
  const std::vector<double>& seconds();
  // Results do not depend on the width, so the choice is free to be made by the clock. `evaluations` of a tile are one piece
  // of a loop; `total`: seconds that the whole call takes, 0: not known.
  int choose_width(int batch, int threads, int evaluations, double total);
  Packed<T>& packed(int width_index);
  void refresh(const std::vector<T>& times, std::vector<Stage<T>>& stages) { time_.refresh(program_, times, stages); }

  // Workspaces outlive a call, one per worker: new memory costs page faults, and in a small solve they show.
  void provide_workspaces(int workers) {
    if (static_cast<int>(workspaces_.size()) < workers) workspaces_.resize(workers);
  }
  char* workspace(int worker, size_t bytes) {
    Aligned<char>& memory = workspaces_[worker];
    if (memory.size() < bytes) memory = Aligned<char>(bytes);
    return memory.get();
  }

  Program<T> program_;
  const Kernels<T>& kernels_;
  TimeSource<T> time_;
  std::map<int, std::unique_ptr<Packed<T>>> packed_;
  std::vector<Aligned<char>> workspaces_;
  std::vector<double> seconds_;
  int forced_ = -1;
  Cost evaluation_, traffic_, solve_;  // of one sample: an evaluation, a number loaded or stored, a whole solve
  Exclusive one_caller_{[this] { abandon(packed_), abandon(workspaces_), abandon(seconds_); }};
};

}  // namespace sparseflow
