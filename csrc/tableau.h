// A Runge-Kutta method as plain arrays; the numbers come from sparseflow_kernels/numerics/tableaus.py.
#pragma once

#include <vector>

namespace sparseflow {

struct Tableau {
  bool adaptive = true;
  int order = 0;
  // adaptive: k_0 = f(t0, y0); stage i + 1 at c[i] with a[i] (i + 1 weights); b, b_error, b_mid have c.size() + 1.
  // fixed: the same with k_0 at t0.
  std::vector<double> c;
  std::vector<std::vector<double>> a;
  std::vector<double> b, b_error, b_mid;

  int stages() const { return static_cast<int>(c.size()) + 1; }
  bool last_stage_is_solution() const {
    if (a.empty() || b.back() != 0.0) return false;
    for (size_t j = 0; j < a.back().size(); ++j)
      if (a.back()[j] != b[j]) return false;
    return true;
  }
};

}  // namespace sparseflow
