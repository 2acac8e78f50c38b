// A Runge-Kutta method as kernels take it.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "../tableau.h"
#include "device_program.h"

namespace sparseflow::cuda {

inline DeviceTableau device_tableau(const Tableau& t) {
  if (t.stages() > kMaxStages) throw std::invalid_argument("solve: at most 16 stages");
  DeviceTableau out{};
  out.adaptive = t.adaptive;
  out.order = t.order;
  out.stages = t.stages();
  out.last_stage_is_solution = t.adaptive && t.last_stage_is_solution();
  std::copy(t.c.begin(), t.c.end(), out.c);
  std::copy(t.b.begin(), t.b.end(), out.b);
  std::copy(t.b_error.begin(), t.b_error.end(), out.b_error);
  std::copy(t.b_mid.begin(), t.b_mid.end(), out.b_mid);
  double* a = out.a;
  for (const auto& row : t.a) a = std::copy(row.begin(), row.end(), a);
  return out;
}

}  // namespace sparseflow::cuda
