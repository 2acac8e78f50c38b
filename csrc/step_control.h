// torchdiffeq's step-size rules as plain functions of doubles (Hairer, Norsett, Wanner, Solving ODEs I, sections II.4).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace sparseflow {

struct StepOptions {
  double min_step = 0.0;
  double max_step = std::numeric_limits<double>::infinity();
  double first_step = std::numeric_limits<double>::quiet_NaN();  // NaN: choose
  double safety = 0.9, ifactor = 10.0, dfactor = 0.2;
  long long max_num_steps = 2147483647LL;  // per output interval
  std::vector<double> step_t, jump_t;      // ascending
};

// The trial step for the first-step search, from the norms of y0 and f0 in units of the tolerance.
inline double first_trial_step(double d0, double d1) { return (d0 < 1e-5 || d1 < 1e-5) ? 1e-6 : std::fabs(0.01 * d0 / d1); }

inline double first_step(double h0, double d1, double d2, int order) {
  const double h1 = (d1 <= 1e-15 && d2 <= 1e-15) ? std::max(1e-6, h0 * 1e-3)
                                                 : std::pow(0.01 / (d2 > d1 ? d2 : d1), 1.0 / order);
  return std::min(100.0 * h0, std::fabs(h1));
}

// An accepted step never shrinks, a NaN ratio makes the step NaN (and then underflow).
inline double next_step(double dt, double ratio, const StepOptions& o, int order) {
  if (ratio == 0.0) return dt * o.ifactor;
  const double floor = ratio < 1.0 ? 1.0 : o.dfactor;
  const double wish = o.safety / std::pow(ratio, 1.0 / order);
  if (std::isnan(wish)) return wish;
  return dt * std::min(o.ifactor, std::max(wish, floor));
}

}  // namespace sparseflow
