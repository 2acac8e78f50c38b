#include "time_source.h"

#include <stdexcept>

#include "solve.h"

namespace sparseflow {

template <class T>
void TimeSource<T>::set_time(const Program<T>& reader, std::shared_ptr<CompiledProgram<T>> time) {
  if (!time) throw std::invalid_argument("set_time: no program");
  if (reader.time_rows == 0 || reader.time_external >= 0) throw std::invalid_argument("set_time: this program reads no time answer of another program");
  const Program<T>& p = time->program();
  if (p.dim != 1 || p.out_rows() != reader.time_rows)
    throw std::invalid_argument("set_time: a time program has one input and here " + std::to_string(reader.time_rows) + " outputs, not " +
                                std::to_string(p.dim) + " and " + std::to_string(p.out_rows()));
  if (p.divergence || p.noise >= 0 || p.context >= 0 || p.externals > 0 || p.time_rows > 0)
    throw std::invalid_argument("set_time: a time program has no divergence, noise, context or functions of time of its own");
  time_ = std::move(time);
}

template <class T>
void TimeSource<T>::refresh(const Program<T>& reader, const std::vector<T>& times, std::vector<Stage<T>>& stages) const {
  std::vector<std::vector<std::vector<T>>> answers;
  std::vector<T> time_answers;
  if (reader.externals > 0) {
    if (!refresh_) throw std::runtime_error("refresh: the program has functions of time that live outside, and no callback was set");
    answers = refresh_(std::vector<double>(times.begin(), times.end()));
    if (answers.size() != times.size()) throw std::runtime_error("refresh: one answer per time is needed");
    for (const auto& answer : answers)
      if (static_cast<int>(answer.size()) != reader.externals) throw std::runtime_error("refresh: one array per external is needed");
    auto check = [&](int external, int n) {
      if (external < 0) return;
      for (const auto& answer : answers)
        if (static_cast<int>(answer[external].size()) != n) throw std::runtime_error("refresh: an answer has the wrong length");
    };
    for (const Modulation<T>& m : reader.modulations) check(m.external_gate, m.n), check(m.external_shift, m.n);
    for (const Matrix<T>& m : reader.matrices) check(m.external, m.nnz());
    check(reader.time_external, reader.time_rows);
    if (reader.time_external >= 0)
      for (const auto& answer : answers) time_answers.insert(time_answers.end(), answer[reader.time_external].begin(), answer[reader.time_external].end());
  }
  if (reader.time_rows > 0 && reader.time_external < 0) {
    if (!time_) throw std::runtime_error("refresh: the program reads the answer of a time program, and none was set");
    time_answers.resize(times.size() * reader.time_rows);
    time_->evaluate(0.0, times.data(), nullptr, static_cast<int>(times.size()), 1, time_answers.data(), nullptr);
  }
  Stage<T>::refresh(stages, times, answers, time_answers);
}

template class TimeSource<float>;
template class TimeSource<double>;

}  // namespace sparseflow
