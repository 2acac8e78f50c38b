// torchdiffeq's step-size rules as plain functions of doubles (Hairer, Norsett, Wanner, Solving ODEs I, section II.4), and
// the sequence of its decisions in a solve, for every engine that keeps its own time.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "host_device.h"

namespace sparseflow {

// What of the options takes part in every decision.
struct StepRule {
  double min_step = 0.0;
  double max_step = std::numeric_limits<double>::infinity();
  double safety = 0.9, ifactor = 10.0, dfactor = 0.2;
  long long max_num_steps = 2147483647LL;  // per output interval
  bool stop_at_outputs = false;            // steps end at output times, instead of passing over them
};

struct StepOptions : StepRule {
  double first_step = std::numeric_limits<double>::quiet_NaN();  // NaN: choose
  std::vector<double> step_t, jump_t;                            // ascending
};

// The trial step for the first-step search, from the norms of y0 and f0 in units of the tolerance.
SF_HD double first_trial_step(double d0, double d1) { return (d0 < 1e-5 || d1 < 1e-5) ? 1e-6 : fabs(0.01 * d0 / d1); }

SF_HD double first_step(double h0, double d1, double d2, int order) {
  const double safe = h0 * 1e-3 > 1e-6 ? h0 * 1e-3 : 1e-6;
  const double h1 = (d1 <= 1e-15 && d2 <= 1e-15) ? safe : fabs(pow(0.01 / (d2 > d1 ? d2 : d1), 1.0 / order));
  return h1 < 100.0 * h0 ? h1 : 100.0 * h0;
}

// An accepted step never shrinks, a NaN ratio makes the step NaN (and then underflow).
SF_HD double next_step(double dt, double ratio, const StepRule& rule, int order) {
  if (ratio == 0.0) return dt * rule.ifactor;
  const double floor = ratio < 1.0 ? 1.0 : rule.dfactor;
  const double wish = rule.safety / pow(ratio, 1.0 / order);
  if (wish != wish) return wish;
  const double factor = wish > floor ? wish : floor;
  return dt * (factor < rule.ifactor ? factor : rule.ifactor);
}

struct Points {  // ascending
  const double* at = nullptr;
  int count = 0;

  // torchdiffeq's index into them moves on only when a step was cut there
  SF_HD int first_after(double t) const {
    int next = 0;
    while (next < count && at[next] <= t) ++next;
    return next < count ? next : (count > 0 ? count - 1 : 0);
  }
};

enum class Proposal : int { kTry = 0, kTooManySteps = 1, kUnderflow = 2 };

// Which step to try, and what became of it. The solve stands at t1; [t0, t1] is the last accepted step, of size last_dt.
struct StepController {
  StepRule rule;
  int order = 1;
  Points step_t, jump_t;
  double t0 = 0, t1 = 0, last_dt = 0;
  double dt = 0;   // of the step to try
  double end = 0;  // where it ends; a step that was cut does not end at t1 + (the size wished for)
  bool at_step = false, at_jump = false;  // it was cut at one of the points
  double output = std::numeric_limits<double>::infinity();  // where no step may pass
  double wished = 0;  // the step's size before it was cut at an output; 0 if it was not
  int next_step_t = 0, next_jump_t = 0;
  long long taken = 0;  // towards the present output

  SF_HD void begin(double t, double first) {
    t0 = t1 = t;
    dt = first;
    next_step_t = step_t.first_after(t);
    next_jump_t = jump_t.first_after(t);
    taken = 0;
  }
  SF_HD void next_output(double t) {
    taken = 0;
    if (rule.stop_at_outputs) output = t;
  }

  SF_HD Proposal propose() {
    if (taken >= rule.max_num_steps) return Proposal::kTooManySteps;
    ++taken;
    if (!(dt - dt == 0.0)) dt = rule.min_step;  // not finite
    if (dt < rule.min_step) dt = rule.min_step;
    if (dt > rule.max_step) dt = rule.max_step;
    if (!(t1 + dt > t1)) return Proposal::kUnderflow;
    end = t1 + dt;
    wished = 0;
    const double whole = dt;
    at_step = at_jump = false;
    if (step_t.count > 0 && t1 < step_t.at[next_step_t] && step_t.at[next_step_t] < t1 + dt) {
      at_step = true;
      end = step_t.at[next_step_t];
      dt = end - t1;
    }
    if (jump_t.count > 0 && t1 < jump_t.at[next_jump_t] && jump_t.at[next_jump_t] < t1 + dt) {
      at_jump = true;
      at_step = false;
      end = jump_t.at[next_jump_t];
      dt = end - t1;
    }
    if (end > output) {
      at_step = at_jump = false;
      end = output;
      dt = end - t1;
      wished = whole;
    }
    return Proposal::kTry;
  }

  // True, and the solve stands at the step's end, if an error norm of `ratio` is accepted. The next size is chosen.
  SF_HD bool judge(double ratio) {
    bool accept = ratio <= 1.0;
    if (dt > rule.max_step) accept = false;
    if (dt <= rule.min_step) accept = true;
    if (accept) {
      t0 = t1;
      t1 = end;
      last_dt = dt;
      if (at_step && next_step_t + 1 < step_t.count) ++next_step_t;
      if (at_jump && next_jump_t + 1 < jump_t.count) ++next_jump_t;
    }
    dt = next_step(dt, ratio, rule, order);
    if (accept && wished > dt) dt = wished;  // an output says nothing about the step after it
    return accept;
  }
};

}  // namespace sparseflow
