// What tests of the CPU engine share: kernels by type, functions of time, and states in memory of the exact size.
#pragma once

#include "cpu/adjoint.h"
#include "cpu/solve.h"
#include "random_program.h"

namespace sparseflow::testing {

template <class T>
const Kernels<T>& table_of(const KernelSet& set) {
  if constexpr (sizeof(T) == 4) return *set.f32;
  else return *set.f64;
}

// What the functions of time say: of the right length for whoever asks.
template <class T>
RefreshCallback<T> externals_of(const Program<T>& p) {
  std::vector<size_t> lengths(p.externals, 1);
  for (const auto& m : p.modulations) {
    if (m.external_gate >= 0) lengths[m.external_gate] = m.n;
    if (m.external_shift >= 0) lengths[m.external_shift] = m.n;
  }
  for (const auto& m : p.matrices)
    if (!m.gated && m.external >= 0) lengths[m.external] = m.nnz();
  if (p.time_external >= 0) lengths[p.time_external] = p.time_rows;
  return [lengths](const std::vector<double>& times) {
    std::vector<std::vector<std::vector<T>>> answers;
    for (double t : times) {
      answers.emplace_back();
      for (size_t n : lengths) {
        answers.back().emplace_back();
        for (size_t i = 0; i < n; ++i) answers.back().back().push_back(T(0.5 + 0.25 * std::sin(double(i) + 3 * t)));
      }
    }
    return answers;
  };
}

// Exactly as large as promised, so that the sanitizer sees any step beyond.
template <class T>
struct Case {
  std::vector<T> x, l, noise;
  int batch;

  Case(Random& random, int batch_, int dim)
      : x(random_states<T>(random, batch_ * dim)), l(random_states<T>(random, batch_)),
        noise(random_states<T>(random, batch_ * dim)), batch(batch_) {}

  SolveInput<T> input(const Tableau& tableau, int threads) const {
    SolveInput<T> in;
    in.batch = batch;
    in.x = x.data(), in.l = l.data(), in.noise = noise.data();
    in.times = {0.25, 0.5, 0.6875};
    in.grid = {0.25, 0.375, 0.5625, 0.6875};
    in.tableau = tableau;
    in.rtol = in.atol = {1e-3, 1e-3};
    in.options.max_num_steps = 60;
    in.threads = threads;
    return in;
  }
};

}  // namespace sparseflow::testing
