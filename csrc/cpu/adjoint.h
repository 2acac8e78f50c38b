// The gradient of an evaluation, or of a whole solve: the accepted steps are walked backwards, their stages computed again
// tile by tile, so that nothing of a hidden layer's size outlives a stage. Exact for what was computed, step sizes fixed.
#pragma once

#include <memory>
#include <vector>

#include "../tableau.h"
#include "pack.h"
#include "thread_pool.h"
#include "time_source.h"

namespace sparseflow {

// A solve that is over: what it was given, and what it recorded.
template <class T>
struct SolveRecord {
  int batch = 0;
  int sign = 1;
  Tableau tableau;
  bool perturb = false;
  const T* noise = nullptr;                      // [batch][dim], if the program carries a tangent
  const T* context = nullptr;                    // [batch][context rows], if the program has a context
  std::vector<double> times;                     // of the outputs, ascending
  std::vector<std::pair<double, double>> steps;  // (t, dt) of the accepted ones
  const T* states = nullptr;                     // [steps + 1][batch][dim]
  int kept = 0;                                  // derivatives per step; at least one of an adaptive method
  const T* derivatives = nullptr;                // [steps + 1][kept][batch][dim]
};

// Cotangents of everything a program is made of, summed over samples, stages and steps.
template <class T>
struct ProgramGradient {
  std::vector<std::vector<double>> matrices;  // of the values, or where gated of the path constants; empty without a sum
  struct Modulation {
    std::vector<double> bias, gate_slope, gate_offset, shift_slope, shift_offset;
  };
  std::vector<Modulation> modulations;
  std::vector<std::vector<double>> vectors;  // of constant row vectors; empty without a sum
  double t = 0;  // of the field's time, all evaluations moved together; without what goes through the time answer
  // Of the time answer, where timed row vectors have sums: the times it was asked for, as the field saw them, and its
  // cotangents there, [times][time_rows]. Whoever gave the answer knows how to go on.
  std::vector<T> time_points;
  std::vector<double> time_cotangents;
};

template <class T>
class CompiledAdjoint {
 public:
  CompiledAdjoint(Program<T> program, const Kernels<T>& kernels);

  // grad_f [batch][out], grad_trace [batch] or null -> grad_x [batch][dim], grad_context [batch][context rows] unless null
  ProgramGradient<T> evaluate(double t, const T* x, const T* noise, int batch, int threads, const T* grad_f, const T* grad_trace, T* grad_x,
                              const T* context = nullptr, T* grad_context = nullptr);

  // grad_xs [times][batch][dim], grad_ls [times][batch] or null -> grad_x [batch][dim], grad_l [batch], grad_context as above
  ProgramGradient<T> solve(const SolveRecord<T>& record, int threads, const T* grad_xs, const T* grad_ls, T* grad_x, T* grad_l,
                           T* grad_context = nullptr);

  const Program<T>& program() const { return program_; }
  void set_values(int matrix, std::vector<T> values) {
    const Exclusive::Hold held(one_caller_);
    sparseflow::set_values(program_, matrix, std::move(values));
    if (program_.matrices[matrix].dynamic()) return;
    for (auto& one : packed_)
      if (one) reweave(program_, *one, matrix);
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
  // Measured seconds per tile of every operation of body, keep and reverse, at the width for this batch.
  std::vector<std::vector<double>> op_seconds(int batch);
  int width(int batch) const;  // of the tiles, in samples: it follows from the program and the batch, never from the clock
  void force_width(int index);  // -1: as the batch asks for; throws std::invalid_argument for those without adjoint kernels

 private:
  template <class U>
  friend class Reversal;

  int width_index(int batch) const;
  Packed<T>& packed(int width_index);
  char* workspace(int worker, size_t bytes) {
    Aligned<char>& memory = workspaces_[worker];
    if (memory.size() < bytes) memory = Aligned<char>(bytes);
    return memory.get();
  }

  Program<T> program_;
  const Kernels<T>& kernels_;
  TimeSource<T> time_;
  std::unique_ptr<Packed<T>> packed_[Kernels<T>::kWidths];
  std::vector<Aligned<char>> workspaces_;
  int forced_ = -1;
  Cost pull_, traffic_, gather_;  // of an evaluation of one sample turned back, a number copied, a sum added up
  Exclusive one_caller_{[this] {
    for (auto& one : packed_) abandon(one);
    abandon(workspaces_);
  }};
};

}  // namespace sparseflow
