// The gradient of an evaluation, or of a whole solve, in one launch: a block takes its tiles through the accepted steps from
// the last to the first, computes their stages again and pulls the cotangents back. No block waits for another; each adds up
// gradients of its own, tile by tile in order. As in a solve, the field is evaluated in one place.
#pragma once

#include "adjoint.h"
#include "solve.cuh"

namespace sparseflow::cuda {

// [samples][columns] -> rows of a tile. Beyond the batch there is the last sample again, whose slopes are what they are: those
// of zeros might be infinite, and its cotangents of zero would become NaN.
template <class T>
SF_DEVICE void load_samples(const T* from, int columns, T* to, int first_sample, int count, int tile_log) {
#pragma unroll 1
  for (int i = threadIdx.x; i < columns << tile_log; i += blockDim.x) {
    const int s = i / columns, c = i - s * columns;
    to[(c << tile_log) + s] = from[size_t(first_sample + (s < count ? s : count - 1)) * columns + c];
  }
}
// rows of a tile are added to [samples][columns]
template <class T>
SF_DEVICE void add_samples(const T* from, int columns, T* to, int first_sample, int count, int tile_log) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count * columns; i += blockDim.x) {
    const int s = i / columns, c = i - s * columns;
    to[size_t(first_sample) * columns + i] += from[(c << tile_log) + s];
  }
}

template <class T, int V, bool Shared>
struct Reversal {
  const AdjointParams<T>& in;
  Block<T, V, Shared> block;
  const DeviceProgram& program;
  const DeviceTableau& tableau;
  int tile = 0;        // at hand
  double of_time = 0;  // this thread's part of the gradient of the field's time

  SF_DEVICE explicit Reversal(const AdjointParams<T>& params)
      : in(params), block(params.program, params.plan, params.global + size_t(blockIdx.x) * params.plan.global_bytes), program(params.program),
        tableau(params.tableau) {}

  // What follows from parameters is computed where it is read: kept, it would take registers from the loops over weights.
  SF_DEVICE int S() const { return 1 << in.plan.tile_log; }
  SF_DEVICE int dim() const { return program.dim; }
  SF_DEVICE int rows() const { return program.dim + program.divergence; }
  SF_DEVICE int size() const { return rows() << in.plan.tile_log; }  // of a tile's state
  SF_DEVICE int stages() const { return in.evaluate ? 1 : tableau.stages; }
  SF_DEVICE int first_sample() const { return tile << in.plan.tile_log; }
  SF_DEVICE int count() const { return in.batch - first_sample() < S() ? in.batch - first_sample() : S(); }

  SF_DEVICE T* array(int which) const {
    return reinterpret_cast<T*>(in.plan.state >= 0 ? shared_memory() + in.plan.state : block.global + in.plan.state_global) + size_t(which) * size();
  }
  SF_DEVICE T* input(int stage) const { return array(stage); }  // [rows][S] each
  SF_DEVICE T* k(int stage) const { return array(stages() + stage); }
  SF_DEVICE T* k_cotangent(int stage) const { return array(2 * stages() + stage); }
  SF_DEVICE T* cotangent() const { return array(3 * stages()); }    // of the step's end,
  SF_DEVICE T* carried() const { return array(3 * stages() + 1); }  // of the derivative there,
  SF_DEVICE T* start() const { return array(3 * stages() + 2); }    // of its beginning
  SF_DEVICE T* lasting() const { return in.sums + size_t(blockIdx.x) * (program.lasting_sums + program.totals); }
  SF_DEVICE T* totals() const { return lasting() + program.lasting_sums; }
  SF_DEVICE T* stage_sums() const { return in.stage_sums + size_t(blockIdx.x) * program.stage_sums; }

  // ---- tiles

  SF_DEVICE void select(int which) {
    tile = which;
    if (program.context.row >= 0) load_columns(in.context, program.context_rows, block.rows_of(program.context));
    if (program.noise.row < 0) return sync();
    T* const noise = block.rows_of(program.noise) + block.slot_of(program.noise);  // slot 1 of the input
    for (int i = threadIdx.x; i < S() * dim(); i += blockDim.x) {
      const int s = i / dim(), c = i - s * dim();
      noise[c * S() + s] = s < count() ? in.noise[size_t(first_sample()) * dim() + i] : T(0);
    }
    sync();
  }
  SF_DEVICE void load_columns(const T* from, int columns, T* to) { load_samples(from, columns, to, first_sample(), count(), block.tile_log); }
  SF_DEVICE void load_rows(const T* from, T* to) { load_columns(from, dim(), to); }
  SF_DEVICE T output_cotangent(int index, int i) const {
    const int c = i / S(), s = i - c * S();
    if (s >= count()) return T(0);
    const size_t sample = size_t(index) * in.batch + first_sample() + s;
    if (c < dim()) return in.grad_xs[sample * dim() + c];
    return in.grad_ls != nullptr ? in.grad_ls[sample] : T(0);
  }

  // ---- one evaluation, and back

  SF_DEVICE void put(const Place& place, const T* rows_, T factor, int columns) {
    T* const to = block.rows_of(place);
    for (int i = threadIdx.x; i < columns * S(); i += blockDim.x) to[i] = factor * rows_[i];
  }
  SF_DEVICE void prepare(T t) {
    if (program.dynamic_modulations) block.modulate(t, true);
    if (program.time_in_input && !in.own_times)
      for (int s = threadIdx.x; s < S(); s += blockDim.x) block.row_of(program.input, dim())[s] = t;
    for (int s = threadIdx.x; s < S(); s += blockDim.x) block.trace()[s] = T(0);
    sync();
    if (program.n_gated) {
      block.sum_paths();
      sync();
    }
  }

  // The field at y; or with of_k, the cotangent of sign * (f, -trace) there, back from it: then that of the state is in
  // state_cotangent, and gradients are added up.
  SF_DEVICE void visit(T t, const T* y, const T* of_k) {
    const bool back = of_k != nullptr;
    put(program.input, y, T(1), dim());
    if (back) {
      put(program.cotangent, of_k, T(in.sign), dim());
      if (program.divergence && program.trace_cotangent.row >= 0) put(program.trace_cotangent, of_k + dim() * S(), T(-in.sign), 1);
    }
    prepare(t);
    for (int list = back ? kKeep : kBody; list <= (back ? kReverse : kBody); ++list) block.run(List(list), lasting(), stage_sums());  // the one call of it
    if (back) take_away(t), give_away();
  }

  // What a graph's evaluation owes to the context and to the time, of the samples there are.
  SF_DEVICE void give_away() {
    if (program.context_cotangent.row >= 0 && in.grad_context != nullptr)
      add_samples(block.rows_of(program.context_cotangent), program.context_rows, in.grad_context, first_sample(), count(), block.tile_log);
    if (program.time_in_input && !in.own_times)
      for (int s = threadIdx.x; s < count(); s += blockDim.x) of_time += double(block.row_of(program.state_cotangent, dim())[s]);
  }

  // Sums whose meaning depends on time, into totals that do not.
  SF_DEVICE void take_away(T t) {
    if (program.stage_sums == 0) return;
    for (int m = 0; m < program.n_gated; ++m) {
      const DeviceGated gated = block.template in_image<DeviceGated>(program.gated)[m];
      if (gated.sum < 0) continue;
      const int* const path_gate = block.template in_image<int>(gated.path_gate);
      const int* const path_entry = block.template in_image<int>(gated.path_entry);
      const int paths = block.template in_image<int>(gated.path_ptr)[gated.entries];
      for (int p = threadIdx.x; p < paths; p += blockDim.x) totals()[gated.totals + p] += block.scale()[gated.gate + path_gate[p]] * stage_sums()[gated.sum + path_entry[p]];
    }
    for (int m = 0; m < program.n_modulations; ++m) {
      const DeviceModulation mod = block.template in_image<DeviceModulation>(program.modulations)[m];
      if (mod.totals < 0) continue;
      for (int j = threadIdx.x; j < mod.n; j += blockDim.x) {
        const T u = stage_sums()[mod.shift_sum + j], s = block.scale()[mod.first + j];  // u = s * (cotangent of z)
        T* to = totals() + mod.totals + j;
        *to += u, to += mod.n;
        if (mod.gate_slope >= 0) {
          const T logit = (stage_sums()[mod.gate_sum + j] + block.template in_image<T>(mod.bias)[j] * u + s * through_output(mod.first, j)) * (T(1) - s);
          *to += t * logit, to += mod.n;
          *to += logit, to += mod.n;
          of_time += double(logit) * double(block.template in_image<T>(mod.gate_slope)[j]);
        }
        if (mod.shift_slope >= 0) {
          const T z = u / s;  // Block::modulate keeps s from zero
          *to += t * z, to += mod.n;
          *to += z;
          of_time += double(z) * double(block.template in_image<T>(mod.shift_slope)[j]);
        }
      }
    }
    sync();
    for (int i = threadIdx.x; i < program.stage_sums; i += blockDim.x) stage_sums()[i] = T(0);
    sync();
  }
  // What matrices of path sums say of one gate.
  SF_DEVICE T through_output(int modulation, int j) const {
    T sum = T(0);
    for (int m = 0; m < program.n_gated; ++m) {
      const DeviceGated gated = block.template in_image<DeviceGated>(program.gated)[m];
      if (gated.sum < 0 || gated.gate != modulation) continue;
      const int *const ptr = block.template in_image<int>(gated.gate_ptr), *const path = block.template in_image<int>(gated.gate_path);
      for (int i = ptr[j]; i < ptr[j + 1]; ++i)
        sum += block.template in_image<T>(gated.path_constant)[path[i]] * stage_sums()[gated.sum + block.template in_image<int>(gated.path_entry)[path[i]]];
    }
    return sum;
  }

  // ---- a step

  // What an output at fraction x of a step owes to its ends, the midpoint and the derivatives at the ends.
  struct Reading {
    T start, end, mid, slope_start, slope_end;
  };
  SF_DEVICE Reading reading(T x) const {
    if (!tableau.adaptive) return {T(1) - x, x, T(0), T(0), T(0)};
    const T x2 = x * x, x3 = x2 * x, x4 = x2 * x2;
    return {T(1) - T(11) * x2 + T(18) * x3 - T(8) * x4, -T(5) * x2 + T(14) * x3 - T(8) * x4, T(16) * (x2 - T(2) * x3 + x4),
            x - T(4) * x2 + T(5) * x3 - T(2) * x4, x2 - T(3) * x3 + T(2) * x4};
  }
  SF_DEVICE double a(int stage, int j) const { return tableau.a[(stage - 1) * stage / 2 + j]; }

  // As the solver took them (solve.cuh); the field's.
  SF_DEVICE T stage_time(int n, int stage, double t0, double t1) const {
    const T begin = T(t0), end = T(t1), step = tableau.adaptive ? T(in.steps[2 * n + 1]) : T(t1 - t0);
    T t;
    if (stage == 0) t = tableau.adaptive ? (n == 0 ? begin : before(begin)) : in.perturb ? after(begin) : begin;
    else if (tableau.c[stage - 1] == 1.0) t = tableau.adaptive || in.perturb ? before(end) : end;
    else t = begin + T(tableau.c[stage - 1]) * step;
    return T(in.sign) * t;
  }

  // A step on the way back: from t0 to t1, with outputs first .. last read off it.
  struct Step {
    int n, first, last;
    double t0, t1;
    int needed = 0;        // derivatives up to the one before the last active stage, whose state follows from them
    unsigned active = 1;   // which stages have a cotangent at all; they are pulled back from the last to the first
    bool end_known = false;  // the last stage's state was recorded
  };
  SF_DEVICE void look_at(Step& step) const {
    const bool adaptive = tableau.adaptive, is_last = step.n + 1 == in.n_steps;
    const int s_end = stages() - 1;
    bool read_inside = false;
    for (int o = step.first; o <= step.last; ++o) {
      const Reading r = reading(T((in.times[o] - step.t0) / (step.t1 - step.t0)));
      read_inside |= r.mid != T(0) || r.slope_start != T(0) || r.slope_end != T(0);
    }
    step.active = 0;
    for (int i = s_end; i >= 0; --i) {
      bool is = tableau.b[i] != 0 || (adaptive && read_inside && (tableau.b_mid[i] != 0 || i == 0 || i == s_end)) || (adaptive && i == s_end && !is_last);
      for (int j = i + 1; j < stages(); ++j) is |= (step.active >> j & 1) && a(j, i) != 0;
      step.active |= unsigned(is) << i;
    }
    step.needed = s_end;
    while (step.needed > 0 && !(step.active >> step.needed & 1)) --step.needed;
    step.end_known = adaptive && tableau.last_stage_is_solution && step.needed == s_end;
  }
  SF_DEVICE T size_of(const Step& step) const { return tableau.adaptive ? T(in.steps[2 * step.n + 1]) : T(step.t1 - step.t0); }

  // The state of the stage behind this one, whose derivative is in `output`, or was recorded.
  SF_DEVICE void next_input(const Step& step, int stage) {
    const size_t per_state = size_t(in.batch) * dim();
    if (step.end_known && stage + 2 == stages()) return load_rows(in.states + size_t(step.n + 1) * per_state, input(stage + 1));
    if (tableau.adaptive && stage == 0) {
      load_rows(in.derivatives + size_t(step.n) * per_state, k(0));
    } else {
      T* const to = k(stage);
      const T* const f = block.rows_of(program.output);
      for (int i = threadIdx.x; i < dim() * S(); i += blockDim.x) to[i] = T(in.sign) * f[i];  // without its trace
    }
    sync();
    const T dt = size_of(step);
    T* const to = input(stage + 1);
    for (int e = threadIdx.x; e < dim() * S(); e += blockDim.x) {
      T y = input(0)[e];
      for (int j = 0; j <= stage; ++j) y += T(a(stage + 1, j)) * dt * k(j)[e];
      to[e] = y;
    }
    sync();
  }

  // The cotangent of the step's end, and those of its outputs, as cotangents of its beginning and of its derivatives.
  SF_DEVICE void share_out(const Step& step) {
    const bool adaptive = tableau.adaptive, is_last = step.n + 1 == in.n_steps;
    const int s_end = stages() - 1;
    const T dt = size_of(step);
    for (int e = threadIdx.x; e < size(); e += blockDim.x) {
      T of_end = cotangent()[e], of_start = T(0), of_mid = T(0), slope_start = T(0), slope_end = T(0);
#pragma unroll 1
      for (int o = step.first; o <= step.last; ++o) {
        const Reading r = reading(T((in.times[o] - step.t0) / (step.t1 - step.t0)));
        const T g = output_cotangent(o, e);
        of_end += r.end * g, of_start += (r.start + r.mid) * g, of_mid += r.mid * g;
        slope_start += r.slope_start * g, slope_end += r.slope_end * g;
      }
      start()[e] = of_start + of_end;
#pragma unroll 1
      for (int j = 0; j < stages(); ++j) {
        T of_k = T(tableau.b[j]) * dt * of_end;
        if (adaptive) {
          of_k += T(tableau.b_mid[j]) * dt * of_mid;
          if (j == 0) of_k += dt * slope_start;
          if (j == s_end) of_k += dt * slope_end + (is_last ? T(0) : carried()[e]);
        }
        k_cotangent(j)[e] = of_k;
      }
    }
    sync();
  }

  // What the pull through a stage found, to where it belongs; without a step, to the state itself.
  SF_DEVICE void give_back(const Step& step, bool is_step, int stage) {
    const T* const pulled = block.rows_of(program.state_cotangent);
    const T dt = is_step ? size_of(step) : T(0);
    T* const to = is_step ? start() : cotangent();
    for (int e = threadIdx.x; e < dim() * S(); e += blockDim.x) {
      const T p = pulled[e];
      to[e] += p;
      if (!is_step) continue;
#pragma unroll 1
      for (int j = 0; j < stage; ++j) k_cotangent(j)[e] += T(a(stage, j)) * dt * p;
    }
    sync();
  }

  // A tile's way back: step by step, and of an adaptive method through the derivative of the first state; or through one
  // evaluation. An adaptive step's first derivative is the last one of the step before, whose cotangent is carried there.
  SF_DEVICE void go_back() {
    const bool adaptive = !in.evaluate && tableau.adaptive;
    for (int e = threadIdx.x; e < size(); e += blockDim.x) cotangent()[e] = carried()[e] = T(0);
    sync();
    Step step;
    step.last = in.n_times - 1;
    for (step.n = in.evaluate ? 0 : in.n_steps - 1; step.n >= (adaptive && in.n_steps > 0 ? -1 : 0); --step.n) {
      const bool is_step = !in.evaluate && step.n >= 0;
      step.needed = 0, step.active = 1;
      if (is_step) {
        const int n = step.n;
        step.t0 = in.steps[2 * n], step.t1 = n + 1 < in.n_steps ? in.steps[2 * n + 2] : step.t0 + in.steps[2 * n + 1];
        int first = step.last;  // outputs read off this step: (t0, t1], the last step's beyond its rounding too
        while (first > 0 && in.times[first] > step.t0) --first;
        step.first = first + 1;
        look_at(step);
      }
      if (!in.evaluate) load_rows(in.states + size_t(is_step ? step.n : 0) * in.batch * dim(), input(0));
      sync();
      // forwards through the stages, then back
      const int s_end = is_step ? stages() - 1 : 0, least = is_step && adaptive ? 1 : 0;
      for (int i = -step.needed; i <= s_end - least; ++i) {
        const bool back = i >= 0;
        const int stage = back ? s_end - i : step.needed + i;
        if (i == 0 && is_step) share_out(step);
        if (back && !(step.active >> stage & 1)) continue;
        const bool known = !back && ((adaptive && stage == 0) || (step.end_known && stage + 1 == s_end));
        if (!known) {
          const T t = in.evaluate ? (in.time != nullptr ? *in.time : in.time_value) : is_step ? stage_time(step.n, stage, step.t0, step.t1) : T(in.sign) * T(in.steps[0]);
          visit(t, input(stage), !back ? nullptr : in.evaluate || is_step ? k_cotangent(stage) : carried());
        }
        if (back) give_back(step, is_step, stage);
        else next_input(step, stage);
      }
      if (is_step) {
        for (int e = threadIdx.x; e < size(); e += blockDim.x) cotangent()[e] = start()[e], carried()[e] = adaptive ? k_cotangent(0)[e] : T(0);
        step.last = step.first - 1;
        sync();
      }
    }
  }

  SF_DEVICE void store_gradient() {
    for (int i = threadIdx.x; i < count() * rows(); i += blockDim.x) {
      const int s = i / rows(), c = i - s * rows();
      const T value = cotangent()[c * S() + s];
      if (c < dim()) in.grad_x[size_t(first_sample() + s) * dim() + c] = value;
      else if (in.grad_l != nullptr) in.grad_l[first_sample() + s] = value;
    }
    sync();
  }

  // ---- from the outside

  // What an evaluation was given.
  SF_DEVICE void load_evaluation() {
    if (in.own_times) {  // a column of x more than there are rows of the state
      load_columns(in.x, dim() + 1, block.rows_of(program.input));
      sync();
      for (int i = threadIdx.x; i < dim() * S(); i += blockDim.x) input(0)[i] = block.rows_of(program.input)[i];
    } else {
      load_rows(in.x, input(0));
    }
    for (int i = threadIdx.x; i < S() * dim(); i += blockDim.x) {
      const int s = i / dim(), c = i - s * dim();
      k_cotangent(0)[c * S() + s] = s < count() ? in.grad_f[size_t(first_sample()) * dim() + i] : T(0);
    }
    if (program.divergence)  // what the solver sees is the opposite of the trace
      for (int s = threadIdx.x; s < S(); s += blockDim.x)
        k_cotangent(0)[dim() * S() + s] = in.grad_trace != nullptr && s < count() ? -in.grad_trace[first_sample() + s] : T(0);
  }

  SF_DEVICE void run() {
    block.begin();
    for (int which = blockIdx.x; which < in.tiles; which += gridDim.x) {
      select(which);
      if (in.evaluate) load_evaluation();
      go_back();
      if (!in.evaluate) {
        for (int e = threadIdx.x; e < size(); e += blockDim.x) cotangent()[e] += output_cotangent(0, e);  // the initial state itself
        sync();
      }
      store_gradient();
      if (in.own_times) {
        for (int s = threadIdx.x; s < count(); s += blockDim.x) in.grad_times[first_sample() + s] = block.row_of(program.state_cotangent, dim())[s];
        sync();
      }
    }
    // the threads' parts of the gradient of time, in their order
    double* const parts = reinterpret_cast<double*>(shared_memory() + block.plan.reduce);
    sync();
    parts[threadIdx.x] = of_time;
    sync();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (unsigned i = 0; i < blockDim.x; ++i) sum += parts[i];
      totals()[program.totals - 1] = T(sum);
    }
  }
};

template <class T, int V, bool Shared>
__global__ void __launch_bounds__(512, 1) adjoint_kernel(const __grid_constant__ AdjointParams<T> params) {
  Reversal<T, V, Shared>(params).run();
}

}  // namespace sparseflow::cuda
