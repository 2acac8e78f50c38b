// Evaluations and whole solves of one initial value problem. A block keeps a tile of the batch, or several in turn, and
// runs every stage of a step without leaving the kernel. With one step size for the batch all blocks meet at one barrier a
// step, add up everybody's error in the same order, and come to the same decision by themselves.
#pragma once

#include "block.cuh"
#include "solve.h"

namespace sparseflow::cuda {

template <class T>
SF_DEVICE T before(T t) { return nextafter(t, t - T(1)); }
template <class T>
SF_DEVICE T after(T t) { return nextafter(t, t + T(1)); }

template <class T, int V, bool Shared>
struct Integration {
  const SolveParams<T>& in;
  Block<T, V, Shared> block;
  const DeviceProgram& program;
  const DeviceTableau& tableau;
  const int S, dim, rows, size, stages;  // size of a tile's state
  T* state;          // y0, f0, y1, f1, mid of the tile
  T* k_inner;        // the stages between the first and the last
  double* errors;    // [2][threads]
  Common<T>* common;
  double* totals;    // the common one's
  StepController* control;
  T* weights;
  int tile = 0, count = 0, first_sample = 0;
  int turn = 0;  // which of y0, y1 (f0, f1) is the old one
  unsigned long long barriers = 0;
  const bool several;  // tiles of this block, in one solve
  int loaded = -1;     // the tile whose noise and context are in the workspace

  SF_DEVICE Integration(const SolveParams<T>& params, bool has_several)
      : in(params), block(params.program, params.plan, params.global + size_t(blockIdx.x) * params.plan.global_bytes), program(params.program),
        tableau(params.tableau), S(1 << params.plan.tile_log), dim(params.program.dim), rows(dim + params.program.divergence), size(rows * S),
        stages(params.tableau.stages), several(has_several) {
    char* const at = params.plan.state >= 0 ? shared_memory() + params.plan.state : block.global + params.plan.state_global;
    state = reinterpret_cast<T*>(at);
    k_inner = state + 5 * size;
    char* const scratch = shared_memory() + params.plan.reduce;  // behind the trace and its parts
    const size_t parts = (size_t(S) * (1 + 2 * (blockDim.x / 32)) * sizeof(T) + 15) / 16 * 16;
    errors = reinterpret_cast<double*>(scratch + parts);
    common = reinterpret_cast<Common<T>*>(errors + 2 * blockDim.x);
    totals = common->totals, control = &common->control, weights = common->weights;
  }

  SF_DEVICE T* part(int which) { return state + size_t(which) * size; }
  SF_DEVICE T* y0() { return part(turn ? 2 : 0); }
  SF_DEVICE T* f0() { return part(turn ? 3 : 1); }
  SF_DEVICE T* y1() { return part(turn ? 0 : 2); }
  SF_DEVICE T* f1() { return part(turn ? 1 : 3); }
  SF_DEVICE T* mid() { return part(4); }
  SF_DEVICE T* k(int j) { return j == 0 ? f0() : tableau.adaptive && j == stages - 1 ? f1() : k_inner + size_t(j - 1) * size; }
  SF_DEVICE void set_weights(T step) {
    for (int i = threadIdx.x; i < kWeights; i += blockDim.x) {
      const double* const from = i < kWeightsB ? tableau.a + i : i < kWeightsMid ? tableau.b + (i - kWeightsB)
                                   : i < kWeightsError ? tableau.b_mid + (i - kWeightsMid) : tableau.b_error + (i - kWeightsError);
      weights[i] = T(*from) * step;
    }
    sync();
  }
  // sum of weights * k at one place; the last stage of an adaptive method is not asked for
  SF_DEVICE T combine(const T* w, int terms, int i) {
    if (terms == 0) return T(0);
    T sum = w[0] * k(0)[i];
    const T* kj = k_inner + i;
    for (int j = 1; j < terms; ++j, kj += size) sum += w[j] * *kj;
    return sum;
  }
  SF_DEVICE double time(int i) const { return in.times[i]; }

  // ---- tiles

  SF_DEVICE void select(int which) {
    tile = which;
    first_sample = tile * S;
    count = in.batch - first_sample < S ? in.batch - first_sample : S;
    if (several) state = in.tile_state + size_t(tile) * 5 * size;
  }
  template <class F>
  SF_DEVICE void for_each_tile(F work) {
    if (!several) return work();
    for (int which = blockIdx.x; which < in.tiles; which += gridDim.x) select(which), work();
  }

  // [samples][columns] <-> rows of the tile, S samples each
  SF_CALLED void load_rows(const T* from, int columns, T* to) {
    for (int i = threadIdx.x; i < S * columns; i += blockDim.x) {
      const int s = i / columns, c = i - s * columns;
      to[size_t(c) * S + s] = s < count ? from[size_t(first_sample) * columns + i] : T(0);
    }
  }
  SF_CALLED void store_rows(const T* rows_, int columns, T* to) {
    for (int i = threadIdx.x; i < count * columns; i += blockDim.x) {
      const int s = i / columns, c = i - s * columns;
      to[size_t(first_sample) * columns + i] = rows_[size_t(c) * S + s];
    }
  }

  SF_CALLED void load_tile() {
    load_rows(in.x, dim, y0());
    if (program.divergence) {
      T* const l = y0() + size_t(dim) * S;
      for (int s = threadIdx.x; s < S; s += blockDim.x) l[s] = s < count && in.l != nullptr ? in.l[first_sample + s] : T(0);
    }
    sync();
  }

  SF_CALLED void begin_tile() {
    const bool noise = program.noise.row >= 0 && in.noise != nullptr, context = program.context.row >= 0;
    if ((!noise && !context) || loaded == tile) return;
    loaded = tile;
    if (noise) load_rows(in.noise, dim, block.rows_of(program.noise));
    if (context) load_rows(in.context, program.context_rows, block.rows_of(program.context));
    sync();
    block.run(kPrologue);
  }

  // ---- the field

  // Everything that depends on time, and a trace of zero; the state is in place. Behind it the operations may run.
  SF_CALLED void prepare(T t) {
    const T own = in.evaluate ? t : T(in.sign) * t;  // the field's
    if (program.dynamic_modulations) block.modulate(own, false);
    if (program.time_in_input && !in.own_times)
      for (int s = threadIdx.x; s < S; s += blockDim.x) block.row_of(program.input, dim)[s] = own;
    for (int s = threadIdx.x; s < S; s += blockDim.x) block.trace()[s] = T(0);
    sync();
    if (program.n_gated) {
      block.sum_paths();
      sync();
    }
  }
  // y0 + sum of weights * k, the state's part of it, to where the program reads it
  SF_DEVICE void stage_input(const T* w, int terms) {
    const T *const y = y0(), *const first = k(0), *const inner = k_inner;
    T* const to = block.rows_of(program.input);
    const int n = dim * S, next = size;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      T sum = y[i];
      if (terms > 0) sum += w[0] * first[i];
      const T* kj = inner + i;
      for (int j = 1; j < terms; ++j, kj += next) sum += w[j] * *kj;
      to[i] = sum;
    }
  }
  // into k: sign * (f, -trace) at the program's input
  SF_CALLED void evaluate(T t, T* to) {
    prepare(t);
    block.run(kBody);
    sync();
    const T* const f = block.rows_of(program.output);
    for (int i = threadIdx.x; i < dim * S; i += blockDim.x) to[i] = T(in.sign) * f[i];
    if (program.divergence)
      for (int s = threadIdx.x; s < S; s += blockDim.x) to[dim * S + s] = T(-in.sign) * block.trace()[s];
    sync();
  }

  // ---- sums over the batch

  // Where a component's sums of the error, or of two things at once, are; then how many samples are bad.
  SF_DEVICE int second() const { return in.components; }
  SF_DEVICE int bad() const { return 2 * in.components; }

  // Sums of squares of value(i) / (atol + rtol max(|y0|, |y1|)) of the tile, component by component, into totals[slot ...].
  template <class Value>
  SF_DEVICE void measure(const T* old, const T* young, int slot, bool blames, Value value) {
    for (int c = 0; c < in.components; ++c) {
      const int begin = in.bounds[c] * S, end = in.bounds[c + 1] * S;
      const T rtol = T(in.rtol[c]), atol = T(in.atol[c]);
      double mine = 0;
      for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {  // always the same sample: a block has a multiple of S threads
        const T a = fabs(old[i]), b = fabs(young[i]);
        const T tolerance = atol + rtol * (a > b || a != a ? a : b);
        const double q = double(T(value(i)) / tolerance);
        mine += q * q;
      }
      errors[threadIdx.x] = mine;
      sync();
      // the samples of a tile fill at most one warp
      if (threadIdx.x < 32) {
        double sum = 0;
        const int s = threadIdx.x;
        if (s < count) {
          const int steps = blockDim.x < unsigned(end - begin) ? blockDim.x : end - begin;  // threads beyond had nothing
          for (int j = s; j < steps; j += S) sum += errors[j];
          if (blames) {  // of the state together, and of the log-density
            double& to = in.blame[(program.divergence && c + 1 == in.components ? size_t(in.batch) : 0) + first_sample + s];
            to = c == 0 || (program.divergence && c + 1 == in.components) ? sum : to + sum;
          }
        }
        for (int bit = 1; bit < 32; bit <<= 1) sum += __shfl_xor_sync(kWarp, sum, bit);
        if (threadIdx.x == 0) totals[slot + c] += sum;
      }
      sync();
    }
  }
  SF_DEVICE void clear_totals() {
    sync();
    if (threadIdx.x < kSums) totals[threadIdx.x] = 0;
    sync();
  }

  // The first n totals, summed up over all blocks; the one place where blocks wait for each other.
  SF_CALLED void meet(int n) {
    if (in.control != Control::kShared || gridDim.x == 1) return;
    const unsigned blocks = gridDim.x;
    double* const slots = in.slots + size_t(barriers & 1) * kSums * blocks;
    const unsigned long long goal = ++barriers * blocks;
    if (threadIdx.x == 0) {
      unsigned long long* const counter = in.barrier;
      for (int i = 0; i < n; ++i) slots[size_t(i) * blocks + blockIdx.x] = totals[i];
      arrive(counter);
      while (look(counter) < goal) spin();  // it counts on, so nobody can miss it
      acquire();
    }
    sync();
    constexpr int kAtOnce = 5;  // as many as a state of two components ever has
    for (int first = 0; threadIdx.x < 32 && first < n; first += kAtOnce) {
      double sum[kAtOnce] = {};
      for (unsigned b = threadIdx.x; b < blocks; b += 32)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (first + i < n) sum[i] += __ldcg(slots + size_t(first + i) * blocks + b);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= n) break;
        for (int bit = 1; bit < 32; bit <<= 1) sum[i] += __shfl_xor_sync(kWarp, sum[i], bit);
        if (threadIdx.x == 0) totals[first + i] = sum[i];
      }
    }
    sync();
  }

  SF_CALLED double mixed_norm(int slot) const {
    const double n = in.control == Control::kShared ? in.batch : count;
    double norm = 0;
    for (int c = 0; c < in.components; ++c) {
      const double own = sqrt(totals[slot + c] / (n * (in.bounds[c + 1] - in.bounds[c])));
      norm = own > norm || own != own ? own : norm;
    }
    return norm;
  }

  // totals[bad()]: samples whose state is not finite. Blames those, and those whose derivative is not.
  SF_CALLED void count_bad() {
    for (int s = threadIdx.x; s < count; s += blockDim.x) {
      T y = T(0), f = T(0);
      for (int c = 0; c < rows; ++c) y += y0()[c * S + s] - y0()[c * S + s], f += f0()[c * S + s] - f0()[c * S + s];
      in.blame[first_sample + s] = double(y) + double(f);
      if (program.divergence) in.blame[size_t(in.batch) + first_sample + s] = 0;
      errors[s] = y == T(0) ? 0 : 1;
    }
    sync();
    if (threadIdx.x == 0)
      for (int s = 0; s < count; ++s) totals[bad()] += errors[s];
    sync();
  }

  // ---- outputs

  SF_CALLED void write(int index, const T* rows_) {
    store_rows(rows_, dim, in.xs + size_t(index) * in.batch * dim);
    if (program.divergence) store_rows(rows_ + size_t(dim) * S, 1, in.ls + size_t(index) * in.batch);
  }
  SF_DEVICE void write_start() {
    for_each_tile([&] { write(0, y0()); });
  }

  // the quartic through y0, y1, mid, f0, f1 of the last step (they have changed places), and its derivative
  SF_CALLED void interpolate(int index) {
    const T x = T((time(index) - control->t0) / (control->t1 - control->t0)), dt = T(control->last_dt);
    const T in_b = -T(10) * x + T(42) * x * x - T(32) * x * x * x, in_mid = T(32) * x - T(96) * x * x + T(64) * x * x * x;
    const T in_fa = T(1) - T(8) * x + T(15) * x * x - T(8) * x * x * x, in_fb = T(2) * x - T(9) * x * x + T(8) * x * x * x;
    for_each_tile([&] {
      const T *const a = y1(), *const b = y0(), *const m = mid(), *const fa = f1(), *const fb = f0();
      for (int i = threadIdx.x; i < count * rows; i += blockDim.x) {
        const int s = i / rows, c = i - s * rows, j = c * S + s;
        const T ya = a[j], yb = b[j], ym = m[j], da = dt * fa[j], db = dt * fb[j];
        // Hairer's form: coefficients of the quartic in x
        const T c4 = T(2) * (db - da) - T(8) * (yb + ya) + T(16) * ym;
        const T c3 = T(5) * da - T(3) * db + T(18) * ya + T(14) * yb - T(32) * ym;
        const T c2 = db - T(4) * da - T(11) * ya - T(5) * yb + T(16) * ym;
        const T value = ya + x * (da + x * (c2 + x * (c3 + x * c4)));
        const size_t sample = size_t(index) * in.batch + first_sample + s;
        if (c < dim) in.xs[sample * dim + c] = value;
        else in.ls[sample] = value;
        if (in.record) {
          const T slope = (in_b * (yb - ya) + in_mid * (ym - ya)) / dt + in_fa * fa[j] + in_fb * fb[j];
          if (c < dim) in.x_slopes[sample * dim + c] = slope;
          else in.l_slopes[sample] = slope;
        }
      }
    });
  }

  SF_CALLED void record_state(int at) {
    if (!in.record || at > in.capacity) return;
    for_each_tile([&] { store_rows(y0(), dim, in.states + size_t(at) * in.batch * dim); });
  }
  SF_CALLED void record_derivative(int at, bool old) {
    if (!in.record || at > in.capacity || !tableau.adaptive) return;
    for_each_tile([&] { store_rows(old ? f1() : f0(), dim, in.derivatives + size_t(at) * in.batch * dim); });
  }

  // ---- adaptive

  SF_CALLED void first_derivative(T t) {
    for_each_tile([&] {
      begin_tile();
      for (int i = threadIdx.x; i < dim * S; i += blockDim.x) block.rows_of(program.input)[i] = y0()[i];
      evaluate(t, f0());
    });
  }

  // Leaves in totals[bad()] how many samples are not finite; NaN for a search that found nothing.
  SF_CALLED double choose_first_step(double t0) {
    clear_totals();
    for_each_tile([&] {
      const T *const y = y0(), *const f = f0();
      measure(y, y, 0, false, [&](int i) { return y[i]; });
      measure(y, y, second(), false, [&](int i) { return f[i]; });
      count_bad();
    });
    meet(bad() + 1);
    if (!(in.first_step != in.first_step)) return in.first_step;
    const double d0 = mixed_norm(0), d1 = mixed_norm(second()), not_finite = totals[bad()];
    const double h0 = first_trial_step(d0, d1);
    if (threadIdx.x == 0) weights[0] = T(h0);
    sync();
    for_each_tile([&] {
      begin_tile();
      stage_input(weights, 1);
      evaluate(T(t0 + h0), f1());
    });
    clear_totals();
    for_each_tile([&] {
      const T *const y = y0(), *const f = f0(), *const g = f1();
      measure(y, y, 0, false, [&](int i) { return g[i] - f[i]; });
    });
    meet(in.components);
    const double d2 = fabs(mixed_norm(0) / h0);
    sync();
    if (threadIdx.x == 0) totals[bad()] = not_finite;
    sync();
    return first_step(h0, d1, d2, tableau.order);
  }

  SF_DEVICE T stage_time(double c, double t0, double dt, double t1) const { return c == 1.0 ? before(T(t1)) : T(t0) + T(c) * T(dt); }

  // By the first thread: whether the host wants the solve to end.
  SF_DEVICE int asked_to_stop() const { return threadIdx.x == 0 && in.stop != nullptr ? *const_cast<const volatile int*>(in.stop) : 0; }

  SF_CALLED double try_step(bool with_mid) {
    const double t0 = control->t1, dt = control->dt, t1 = control->end;
    const int stop = asked_to_stop();  // early: the answer takes a while
    set_weights(T(dt));
    clear_totals();
    for_each_tile([&] {
      begin_tile();
      for (int i = 0; i + 1 < stages; ++i) {
        stage_input(weights + i * (i + 1) / 2, i + 1);
        evaluate(stage_time(tableau.c[i], t0, dt, t1), k(i + 1));
      }
      const T *const y = y0(), *const last = block.rows_of(program.input), *const f = f1();
      T *const end = y1(), *const middle = mid();
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        // where the last stage is at the solution, it is the state f1 belongs to, bit for bit
        end[i] = tableau.last_stage_is_solution && i < dim * S ? last[i] : y[i] + combine(weights + kWeightsB, stages - 1, i) + weights[kWeightsB + stages - 1] * f[i];
        if (with_mid) middle[i] = y[i] + combine(weights + kWeightsMid, stages - 1, i) + weights[kWeightsMid + stages - 1] * f[i];
      }
      sync();
      measure(y, end, 0, true, [&](int i) { return combine(weights + kWeightsError, stages - 1, i) + weights[kWeightsError + stages - 1] * f[i]; });
    });
    // with one step size for all, the first block's word counts
    if (threadIdx.x == 0 && stop != 0 && (blockIdx.x == 0 || in.control != Control::kShared)) totals[second()] = 1;
    sync();
    meet(second() + 1);
    return mixed_norm(0);
  }

  SF_CALLED void adaptive(SolveStats* stats) {
    const double start = time(0);
    write_start();
    record_state(0);
    first_derivative(T(start));
    const double first = choose_first_step(start);
    double nfe = in.first_step != in.first_step ? 2 : 1, accepted = 0, rejected = 0;
    bool all_finite = totals[bad()] == 0, checked = false;
    if (threadIdx.x == 0) {
      control->rule = in.rule;
      control->order = tableau.order;
      control->step_t = {in.times + in.n_times + in.n_grid, in.n_step_t};
      control->jump_t = {in.times + in.n_times + in.n_grid + in.n_step_t, in.n_jump_t};
      control->begin(start, first);
    }
    sync();
    Status status = Status::kOk;
    int index = 1, written = 1;
    for (; index < in.n_times; ++index) {
      if (threadIdx.x == 0) control->next_output(time(index));
      sync();
      while (time(index) > control->t1) {
        sync();  // all have read what was decided last
        if (threadIdx.x == 0) common->proposal = int(control->propose());
        sync();
        const Proposal proposal = Proposal(common->proposal);
        if (proposal != Proposal::kTry) status = proposal == Proposal::kUnderflow ? Status::kUnderflow : Status::kMaxNumSteps;
        if (proposal == Proposal::kTry && !checked) {
          if (!all_finite) status = Status::kNonFinite;
          checked = true;
        }
        if (status != Status::kOk) break;

        const double ratio = try_step(control->end >= time(index));
        nfe += stages - 1;
        if (totals[second()] != 0) {
          status = Status::kInterrupted;
          break;
        }
        sync();
        if (threadIdx.x == 0) common->accepted = control->judge(ratio);
        sync();
        if (!common->accepted) {
          ++rejected;
          continue;
        }
        if (in.steps != nullptr && accepted < in.step_capacity && blockIdx.x == 0 && threadIdx.x == 0) {
          in.steps[2 * int(accepted)] = control->t0;
          in.steps[2 * int(accepted) + 1] = control->last_dt;
        }
        turn ^= 1;
        record_derivative(int(accepted), true);
        ++accepted;
        record_state(int(accepted));
        if (!(ratio - ratio == 0)) {  // a step that was forced
          clear_totals();
          for_each_tile([&] { count_bad(); });
          meet(bad() + 1);
          all_finite = totals[bad()] == 0;
          checked = false;
        }
        if (control->at_jump) {
          // the output quartic of this step still needs the derivative from before the jump
          for (int i = index; i < in.n_times && time(i) <= control->t1; ++i) interpolate(i), written = i + 1;
          sync();
          first_derivative(after(T(control->t1)));
          ++nfe;
        }
      }
      if (status != Status::kOk) break;
      if (index >= written) interpolate(index);
      sync();
    }
    record_derivative(int(accepted), false);
    leave_nothing(status == Status::kOk ? in.n_times : (index > written ? index : written));
    tell(stats, nfe, accepted, rejected, status, control->t1, control->dt);
  }

  // Outputs a failed solve did not come to are NaN.
  SF_CALLED void leave_nothing(int index) {
    for (; index < in.n_times; ++index) {
      for_each_tile([&] {
        for (int i = threadIdx.x; i < count * dim; i += blockDim.x) in.xs[(size_t(index) * in.batch + first_sample) * dim + i] = T(NAN);
        if (program.divergence)
          for (int s = threadIdx.x; s < count; s += blockDim.x) in.ls[size_t(index) * in.batch + first_sample + s] = T(NAN);
      });
    }
  }
  SF_CALLED void tell(SolveStats* stats, double nfe, double accepted, double rejected, Status status, double t, double dt) {
    if (threadIdx.x == 0 && (in.control != Control::kShared || blockIdx.x == 0)) *stats = {nfe, accepted, rejected, double(int(status)), t, dt, double(barriers), 0};
    sync();
  }

  // ---- fixed grid

  SF_CALLED void fixed(SolveStats* stats) {
    const double* const grid = in.times + in.n_times;
    write_start();
    record_state(0);
    int index = 1, n = 0;
    Status status = Status::kOk;
    for (; n + 1 < in.n_grid; ++n) {
      const double t0 = grid[n], t1 = grid[n + 1];
      const T start = T(t0), end = T(t1), step = T(t1 - t0);
      int last = index;
      while (last < in.n_times && t1 >= time(last)) ++last;
      sync();
      if (threadIdx.x == 0) common->stop = asked_to_stop();
      set_weights(step);
      if (common->stop != 0) {  // blocks end where they are: nobody reads what an interrupted solve leaves
        status = Status::kInterrupted;
        break;
      }
      for_each_tile([&] {
        begin_tile();
        for (int j = 0; j < stages; ++j) {
          stage_input(weights + (j - 1) * j / 2, j);
          const double c = j == 0 ? 0.0 : tableau.c[j - 1];
          const T t = j == 0 ? (in.perturb ? after(start) : start) : c == 1.0 ? (in.perturb ? before(end) : end) : start + T(c) * step;
          evaluate(t, k(j));
        }
        const T* const y = y0();
        T* const young = y1();
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
          young[i] = y[i] + combine(weights + kWeightsB, stages, i);
        }
        sync();
        for (int o = index; o < last; ++o) {
          const double t = time(o);
          const T x = T((t - t0) / (t1 - t0));
          if (t == t0) write(o, y);
          else if (t == t1) write(o, young);
          else {
            T* const between = mid();
            for (int i = threadIdx.x; i < size; i += blockDim.x) between[i] = y[i] + x * (young[i] - y[i]);
            sync();
            write(o, between);
            sync();
          }
        }
      });
      if (in.steps != nullptr && n < in.step_capacity && blockIdx.x == 0 && threadIdx.x == 0) in.steps[2 * n] = t0, in.steps[2 * n + 1] = t1 - t0;
      index = last;
      turn_states();
      record_state(n + 1);
    }
    leave_nothing(status == Status::kOk ? in.n_times : index);
    tell(stats, double(n) * stages, n, 0, status, status == Status::kOk ? 0.0 : grid[n], 0);
  }
  // y1 becomes y0; the stages of a fixed step are not carried over
  SF_CALLED void turn_states() {
    for_each_tile([&] {
      for (int i = threadIdx.x; i < size; i += blockDim.x) y0()[i] = y1()[i];
    });
    sync();
  }

  // ---- from the outside

  SF_CALLED void solve_shared() {
    block.begin();
    if (several) for_each_tile([&] { load_tile(); });
    else select(blockIdx.x), load_tile();
    tableau.adaptive ? adaptive(in.stats) : fixed(in.stats);
  }
  SF_CALLED void solve_tiles() {
    block.begin();
    for (;;) {
      sync();
      if (threadIdx.x == 0) common->next_tile = atomicAdd(in.next_tile, 1);
      sync();
      const int which = common->next_tile;
      if (which >= in.tiles) return;
      select(which);
      turn = 0;
      loaded = -1;
      load_tile();
      tableau.adaptive ? adaptive(in.stats + which) : fixed(in.stats + which);
    }
  }
  SF_CALLED void evaluate_batch() {
    block.begin();
    const T t = in.time != nullptr ? *in.time : in.time_value;
    for (int which = blockIdx.x; which < in.tiles; which += gridDim.x) {
      select(which);
      begin_tile();
      T* const y = block.rows_of(program.input);
      load_rows(in.x, dim + in.own_times, y);
      prepare(t);
      block.run(kBody);
      sync();
      const T* const f = block.rows_of(program.output);
      for (int i = threadIdx.x; i < count * dim; i += blockDim.x) {
        const int s = i / dim, c = i - s * dim;
        in.f[size_t(first_sample) * dim + i] = f[size_t(c) * S + s];
      }
      if (in.f_trace != nullptr)
        for (int s = threadIdx.x; s < count; s += blockDim.x) in.f_trace[first_sample + s] = block.trace()[s];
      sync();
    }
  }
};

template <class T, int V, bool Shared>
__global__ void __launch_bounds__(512) solve_kernel(const __grid_constant__ SolveParams<T> params) {
  if (params.evaluate) return Integration<T, V, Shared>(params, false).evaluate_batch();
  if (params.control == Control::kShared) return Integration<T, V, Shared>(params, params.tiles > int(gridDim.x)).solve_shared();
  Integration<T, V, Shared>(params, false).solve_tiles();
}

}  // namespace sparseflow::cuda
