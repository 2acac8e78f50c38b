// Where a compiled program's functions of time are: those that live outside, and the program that gives the time answer.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "pack.h"

namespace sparseflow {

// Answers for functions of time that live outside: for every time, one array per external of the program.
template <class T>
using RefreshCallback = std::function<std::vector<std::vector<std::vector<T>>>(const std::vector<double>& times)>;

template <class T>
class CompiledProgram;

template <class T>
class TimeSource {
 public:
  void set_refresh(RefreshCallback<T> refresh) { refresh_ = std::move(refresh); }
  // A program of one input, the time, and as many outputs as `reader` has time rows, which itself depends on nothing else.
  void set_time(const Program<T>& reader, std::shared_ptr<CompiledProgram<T>> time);

  // Makes stages of `reader` ready for their times, with one call of the callback and one of the time program for all.
  void refresh(const Program<T>& reader, const std::vector<T>& times, std::vector<Stage<T>>& stages) const;

 private:
  RefreshCallback<T> refresh_;
  std::shared_ptr<CompiledProgram<T>> time_;
};

}  // namespace sparseflow
