// Evaluations and whole solves of one initial value problem. A block keeps a tile of the batch, or several in turn, and
// runs every stage of a step without leaving the kernel. With one step size for the batch all blocks meet at one barrier a
// step, add up everybody's error in the same order, and come to the same decision by themselves.
//
// A solve is a sequence of tasks: a block takes one to its tiles, its first thread decides what came out of it and what is
// next (`decide`), and all of them deliver what is known by then. There is one place where the field is evaluated: all of it
// is one function for the compiler, so that parameters stay in constant memory, and the little that a solve knows between
// its tasks lies in shared memory and takes no registers from the loops over weights.
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
  int tile = 0;     // at hand
  int loaded = -1;  // the tile whose noise and context are in the workspace

  SF_DEVICE explicit Integration(const SolveParams<T>& params)
      : in(params), block(params.program, params.plan, params.global + size_t(blockIdx.x) * params.plan.global_bytes), program(params.program),
        tableau(params.tableau) {}

  // What follows from parameters is computed where it is read: kept, it would take registers from the loops over weights.
  SF_DEVICE int S() const { return 1 << in.plan.tile_log; }
  SF_DEVICE int dim() const { return program.dim; }
  SF_DEVICE int rows() const { return program.dim + program.divergence; }
  SF_DEVICE int size() const { return rows() << in.plan.tile_log; }  // of a tile's state
  SF_DEVICE int stages() const { return tableau.stages; }
  SF_DEVICE int first_sample() const { return tile << in.plan.tile_log; }
  SF_DEVICE int count() const { return in.batch - first_sample() < S() ? in.batch - first_sample() : S(); }
  // Whether this block has several tiles in one solve.
  SF_DEVICE bool several() const { return !in.evaluate && in.control == Control::kShared && in.tiles > int(gridDim.x); }

  // In shared memory, behind the trace and its parts.
  SF_DEVICE double* errors() const {  // [threads]
    const int parts = int((size_t(S()) * (1 + 2 * (blockDim.x / 32)) * sizeof(T) + 15) / 16 * 16);
    return block.template in_shared<double>(in.plan.reduce + parts);
  }
  SF_DEVICE Common<T>& common() const { return *reinterpret_cast<Common<T>*>(errors() + blockDim.x); }
  SF_DEVICE double* totals() const { return common().totals; }
  SF_DEVICE T* weights() const { return common().weights; }

  SF_DEVICE T* own_state() const {
    return reinterpret_cast<T*>(in.plan.state >= 0 ? shared_memory() + in.plan.state : block.global + in.plan.state_global);
  }
  // y0, f0, y1, f1, mid of the tile. Of the two pairs (y, f), which is the old one changes with every step.
  SF_DEVICE T* part(int which) const { return (several() ? in.tile_state + size_t(tile) * 5 * size() : own_state()) + size_t(which) * size(); }
  SF_DEVICE T* y0() const { return part(common().turn ? 2 : 0); }
  SF_DEVICE T* f0() const { return part(common().turn ? 3 : 1); }
  SF_DEVICE T* y1() const { return part(common().turn ? 0 : 2); }
  SF_DEVICE T* f1() const { return part(common().turn ? 1 : 3); }
  SF_DEVICE T* mid() const { return part(4); }
  SF_DEVICE T* k_inner() const { return own_state() + 5 * size(); }  // the stages between the first and the last, then a place for the error
  SF_DEVICE T* k(int j) const { return j == 0 ? f0() : tableau.adaptive && j == stages() - 1 ? f1() : k_inner() + size_t(j - 1) * size(); }
  SF_DEVICE T* error() const { return k_inner() + size_t(stages() - 2) * size(); }  // of an adaptive step
  SF_DEVICE void set_weights(T step) {
    T* const to = weights();
    for (int i = threadIdx.x; i < kWeights; i += blockDim.x) {
      const double* const from = i < kWeightsB ? tableau.a + i : i < kWeightsMid ? tableau.b + (i - kWeightsB)
                                   : i < kWeightsError ? tableau.b_mid + (i - kWeightsMid) : tableau.b_error + (i - kWeightsError);
      to[i] = T(*from) * step;
    }
  }
  // from + the sum of weights * k, without `from` if it is null; the k of the last of an adaptive method's stages is `last`.
  SF_DEVICE void combine(T* to, const T* from, const T* w, int inner_terms, const T* last) const {
    const T *const first = f0(), *const inner = k_inner();
    const int n = size();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      T sum = w[0] * first[i];
      const T* kj = inner + i;
#pragma unroll 2
      for (int j = 1; j < inner_terms; ++j, kj += n) sum += w[j] * *kj;
      if (from != nullptr) sum = from[i] + sum;
      if (last != nullptr) sum += w[inner_terms] * last[i];
      to[i] = sum;
    }
  }
  SF_DEVICE double time(int i) const { return in.times[i]; }

  // ---- tiles

  // The block's next tile of the same task, if it takes several.
  SF_DEVICE bool next_tile() {
    if (!several() && !in.evaluate) return false;
    tile += gridDim.x;
    if (tile < in.tiles) return true;
    tile = blockIdx.x;
    return false;
  }

  // [samples][columns] <-> rows of the tile, S samples each
  SF_DEVICE void load_rows(const T* from, int columns, T* to) {
#pragma unroll 1
    for (int i = threadIdx.x; i < S() * columns; i += blockDim.x) {
      const int s = i / columns, c = i - s * columns;
      to[size_t(c) * S() + s] = s < count() ? from[size_t(first_sample()) * columns + i] : T(0);
    }
  }
  SF_DEVICE void store_rows(const T* rows_, int columns, T* to) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count() * columns; i += blockDim.x) {
      const int s = i / columns, c = i - s * columns;
      to[size_t(first_sample()) * columns + i] = rows_[size_t(c) * S() + s];
    }
  }

  SF_DEVICE void load_tile() {
    load_rows(in.x, dim(), y0());
    if (program.divergence) {
      T* const l = y0() + size_t(dim()) * S();
      for (int s = threadIdx.x; s < S(); s += blockDim.x) l[s] = s < count() && in.l != nullptr ? in.l[first_sample() + s] : T(0);
    }
    sync();
  }

  // Whether the prologue is to run, because another tile's noise and context were there.
  SF_DEVICE bool load_given() {
    const bool noise = program.noise.row >= 0 && in.noise != nullptr, context = program.context.row >= 0;
    if ((!noise && !context) || loaded == tile) return false;
    loaded = tile;
    if (noise) load_rows(in.noise, dim(), block.rows_of(program.noise));
    if (context) load_rows(in.context, program.context_rows, block.rows_of(program.context));
    sync();
    return true;
  }

  // ---- the field

  // Everything that depends on time, and a trace of zero; the state is in place. Behind it the operations may run.
  SF_DEVICE void prepare(T t) {
    const T own = in.evaluate ? t : T(in.sign) * t;  // the field's
    if (program.dynamic_modulations) block.modulate(own, false);
    if (program.time_in_input && !in.own_times)
      for (int s = threadIdx.x; s < S(); s += blockDim.x) block.row_of(program.input, dim())[s] = own;
    for (int s = threadIdx.x; s < S(); s += blockDim.x) block.trace()[s] = T(0);
    sync();
    if (program.n_gated) {
      block.sum_paths();
      sync();
    }
  }
  // y0 + sum of weights * k, the state's part of it, to where the program reads it
  SF_DEVICE void stage_input(const T* w, int terms) {
    const T *const y = y0(), *const first = f0(), *const inner = k_inner();
    T* const to = block.rows_of(program.input);
    const int n = dim() * S(), next = size();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      T sum = y[i];
      if (terms > 0) sum += w[0] * first[i];
      const T* kj = inner + i;
#pragma unroll 4
      for (int j = 1; j < terms; ++j, kj += next) sum += w[j] * *kj;
      to[i] = sum;
    }
  }
  // sign * (f, -trace) at the program's input
  SF_DEVICE void store_stage(T* to) {
    const T* const f = block.rows_of(program.output);
    for (int i = threadIdx.x; i < dim() * S(); i += blockDim.x) to[i] = T(in.sign) * f[i];
    if (program.divergence)
      for (int s = threadIdx.x; s < S(); s += blockDim.x) to[dim() * S() + s] = T(-in.sign) * block.trace()[s];
    sync();
  }
  SF_DEVICE void store_evaluation() {
    store_rows(block.rows_of(program.output), dim(), in.f);
    if (in.f_trace != nullptr)
      for (int s = threadIdx.x; s < count(); s += blockDim.x) in.f_trace[first_sample() + s] = block.trace()[s];
    sync();
  }

  SF_DEVICE T stage_time(const Task& task, int stage) const {
    const T begin = T(task.t0), end = T(task.t1);
    if (task.pass == Pass::kEvaluation) return in.time != nullptr ? *in.time : in.time_value;
    if (task.pass == Pass::kStep) return tableau.c[stage] == 1.0 ? before(end) : begin + T(tableau.c[stage]) * T(task.dt);
    if (task.pass != Pass::kGrid) return begin;
    if (stage == 0) return in.perturb ? after(begin) : begin;
    const double c = tableau.c[stage - 1];
    return c == 1.0 ? (in.perturb ? before(end) : end) : begin + T(c) * T(task.dt);
  }

  // ---- sums over the batch

  // Where a component's sums of the error, or of two things at once, are; then how many samples are bad.
  SF_DEVICE int second() const { return in.components; }
  SF_DEVICE int bad() const { return 2 * in.components; }

  // Sums of squares of value / (atol + rtol max(|y0|, |y1|)) of the tile, component by component, into totals()[slot ...].
  SF_DEVICE void measure(const T* old, const T* young, const T* value, int slot, bool blames) {
    for (int c = 0; c < in.components; ++c) {
      const int begin = in.bounds[c] * S(), end = in.bounds[c + 1] * S();
      const T rtol = T(in.rtol[c]), atol = T(in.atol[c]);
      double mine = 0;
      for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {  // always the same sample: a block has a multiple of S threads
        const T a = fabs(old[i]), b = fabs(young[i]);
        const T tolerance = atol + rtol * (a > b || a != a ? a : b);
        const double q = double(value[i] / tolerance);
        mine += q * q;
      }
      errors()[threadIdx.x] = mine;
      sync();
      // the samples of a tile fill at most one warp
      if (threadIdx.x < 32) {
        double sum = 0;
        const int s = threadIdx.x;
        if (s < count()) {
          const int steps = blockDim.x < unsigned(end - begin) ? blockDim.x : end - begin;  // threads beyond had nothing
          for (int j = s; j < steps; j += S()) sum += errors()[j];
          if (blames) {  // of the state together, and of the log-density
            double& to = in.blame[(program.divergence && c + 1 == in.components ? size_t(in.batch) : 0) + first_sample() + s];
            to = c == 0 || (program.divergence && c + 1 == in.components) ? sum : to + sum;
          }
        }
        for (int bit = 1; bit < 32; bit <<= 1) sum += __shfl_xor_sync(kWarp, sum, bit);
        if (threadIdx.x == 0) totals()[slot + c] += sum;
      }
      sync();
    }
  }

  // The first n totals, summed up over all blocks; the one place where blocks wait for each other.
  SF_DEVICE void meet(int n, unsigned long long barriers) {
    if (n == 0 || in.control != Control::kShared || gridDim.x == 1) return;
    const unsigned blocks = gridDim.x;
    double* const slots = in.slots + size_t(barriers & 1) * kSums * blocks;
    if (threadIdx.x == 0) {
      const unsigned long long goal = (common().barriers = barriers + 1) * blocks;
      unsigned long long* const counter = in.barrier;
      for (int i = 0; i < n; ++i) slots[size_t(i) * blocks + blockIdx.x] = totals()[i];
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
        if (threadIdx.x == 0) totals()[first + i] = sum[i];
      }
    }
    sync();
  }

  SF_DEVICE double mixed_norm(int slot) const {
    const double n = in.control == Control::kShared ? in.batch : count();
    double norm = 0;
    for (int c = 0; c < in.components; ++c) {
      const double own = sqrt(totals()[slot + c] / (n * (in.bounds[c + 1] - in.bounds[c])));
      norm = own > norm || own != own ? own : norm;
    }
    return norm;
  }

  // totals()[bad()]: samples whose state is not finite. Blames those, and those whose derivative is not.
  SF_DEVICE void count_bad() {
    const T *const of_y = y0(), *const of_f = f0();
    for (int s = threadIdx.x; s < count(); s += blockDim.x) {
      T y = T(0), f = T(0);
      for (int c = 0; c < rows(); ++c) y += of_y[c * S() + s] - of_y[c * S() + s], f += of_f[c * S() + s] - of_f[c * S() + s];
      in.blame[first_sample() + s] = double(y) + double(f);
      if (program.divergence) in.blame[size_t(in.batch) + first_sample() + s] = 0;
      errors()[s] = y == T(0) ? 0 : 1;
    }
    sync();
    if (threadIdx.x == 0)
      for (int s = 0; s < count(); ++s) totals()[bad()] += errors()[s];
    sync();
  }

  // ---- a task

  // By the first thread: whether the host wants the solve to end.
  SF_DEVICE int asked_to_stop() const { return threadIdx.x == 0 && in.stop != nullptr ? *const_cast<const volatile int*>(in.stop) : 0; }

  // One tile's part of the task; its sums are added to the block's.
  SF_DEVICE void work(const Task& task) {
    const Pass pass = task.pass;
    if (pass == Pass::kLoad || pass == Pass::kStart) load_tile();
    for (int stage = 0; stage < task.stages; ++stage) {
      const bool new_tile = load_given();
      if (pass == Pass::kEvaluation) load_rows(in.x, dim() + in.own_times, block.rows_of(program.input));
      else if (pass == Pass::kStep) stage_input(weights() + stage * (stage + 1) / 2, stage + 1);
      else if (pass == Pass::kGrid) stage_input(weights() + (stage - 1) * stage / 2, stage);
      else stage_input(weights(), pass == Pass::kTrial ? 1 : 0);
      for (int list = new_tile ? kPrologue : kBody; list <= kBody; ++list) {  // the one call of it
        if (list == kBody) prepare(stage_time(task, stage));
        block.run(List(list));
      }
      sync();
      if (pass == Pass::kEvaluation) store_evaluation();
      else store_stage(pass == Pass::kStep ? k(stage + 1) : pass == Pass::kTrial ? f1() : k(stage));
    }

    if (pass == Pass::kTrial) {
      T* const f = f1();
      const T* const before = f0();
      for (int i = threadIdx.x; i < size(); i += blockDim.x) f[i] -= before[i];
      sync();
    } else if (pass == Pass::kStep || pass == Pass::kGrid) {
      const bool adaptive = pass == Pass::kStep;
      for (int what = 0; what < (adaptive ? 3 : 1); ++what) {  // the end, the middle, the error
        if (what == 1 && !task.with_mid) continue;
        combine(what == 0 ? y1() : what == 1 ? mid() : error(), what == 2 ? nullptr : y0(),
                weights() + (what == 0 ? kWeightsB : what == 1 ? kWeightsMid : kWeightsError), adaptive ? stages() - 1 : stages(), adaptive ? f1() : nullptr);
      }
      if (adaptive && tableau.last_stage_is_solution) {  // it is the state f1 belongs to, bit for bit
        T* const end = y1();
        const T* const last = block.rows_of(program.input);
        for (int i = threadIdx.x; i < dim() * S(); i += blockDim.x) end[i] = last[i];
      }
      sync();
    }
    for (int m = 0; m < task.measures; ++m) {
      const T* const value = pass == Pass::kStep ? error() : pass == Pass::kTrial ? f1() : m == 0 ? y0() : f0();
      measure(y0(), pass == Pass::kStep ? y1() : y0(), value, m * second(), pass == Pass::kStep);
    }
    if (pass == Pass::kStart || pass == Pass::kCount) count_bad();
  }

  SF_DEVICE void take() {
    const Task& task = common().task;
    const int stop = task.pass == Pass::kStep ? asked_to_stop() : 0;  // early: the answer takes a while
    set_weights(T(task.dt));
    if (task.pass == Pass::kTrial && threadIdx.x == 0) weights()[0] = T(task.dt);
    if (threadIdx.x < kSums) totals()[threadIdx.x] = 0;
    sync();
    do work(task);
    while (next_tile());
    // with one step size for all, the first block's word counts
    if (threadIdx.x == 0 && stop != 0 && (blockIdx.x == 0 || in.control != Control::kShared)) totals()[second()] = 1;
    const int sums = task.sums;
    const unsigned long long barriers = common().barriers;
    sync();  // from now on the first thread may change what is common
    meet(sums, barriers);
  }

  // ---- decisions, by the first thread

  SF_DEVICE void next_task(Pass pass, int n, int measures, int sums, double t0, double dt, double t1) {
    common().task = {pass, n, measures, sums, 0, t0, dt, t1};
  }
  SF_DEVICE void end(Status status) {
    common().status = status;
    next_task(Pass::kDone, 0, 0, 0, 0, 0, 0);
  }

  // The next step of an adaptive method, if there is one.
  SF_DEVICE void propose() {
    StepController& control = common().control;
    if (common().index == in.n_times) return end(Status::kOk);
    const Proposal proposal = control.propose();
    if (proposal != Proposal::kTry) return end(proposal == Proposal::kUnderflow ? Status::kUnderflow : Status::kMaxNumSteps);
    if (!common().checked && !common().all_finite) return end(Status::kNonFinite);
    common().checked = 1;
    next_task(Pass::kStep, stages() - 1, 1, second() + 1, control.t1, control.dt, control.end);
    common().task.with_mid = control.end >= time(common().index);
  }
  // The next step of a grid.
  SF_DEVICE void go_on() {
    const double* const grid = in.times + in.n_times;
    const int n = int(common().accepted);
    if (n + 1 >= in.n_grid) return end(Status::kOk);
    common().control.t1 = grid[n];
    if (asked_to_stop() != 0) return end(Status::kInterrupted);  // blocks end where they are: nobody reads what is left then
    next_task(Pass::kGrid, stages(), 0, 0, grid[n], grid[n + 1] - grid[n], grid[n + 1]);
  }
  SF_DEVICE void begin(double first) {
    common().control.begin(time(0), first);
    if (in.n_times > 1) common().control.next_output(time(1));
    propose();
  }
  // A step from the task's t0 to its t1 is done: the outputs on it can be read off.
  SF_DEVICE void move(double size_) {
    Common<T>& c = common();
    if (in.steps != nullptr && c.accepted < in.step_capacity && blockIdx.x == 0) {
      in.steps[2 * int(c.accepted)] = c.task.t0;
      in.steps[2 * int(c.accepted) + 1] = size_;
    }
    c.turn ^= 1;
    c.accepted += 1;
    c.moved = 1;
    c.first_output = c.index;
    while (c.index < in.n_times && time(c.index) <= c.task.t1) {
      ++c.index;
      if (tableau.adaptive && c.index < in.n_times) c.control.next_output(time(c.index));
    }
    c.last_output = c.index;
  }

  SF_DEVICE void decide() {
    Common<T>& c = common();
    StepController& control = c.control;
    c.moved = c.first_output = c.last_output = 0;
    switch (c.task.pass) {
      case Pass::kLoad:
        c.last_output = 1;  // the first state itself
        return go_on();
      case Pass::kStart:
        c.last_output = 1;
        c.all_finite = totals()[bad()] == 0;
        c.nfe = 1;
        if (!(in.first_step != in.first_step)) return begin(in.first_step);
        c.d1 = mixed_norm(second());
        c.h0 = first_trial_step(mixed_norm(0), c.d1);
        c.nfe = 2;
        return next_task(Pass::kTrial, 1, 1, in.components, time(0) + c.h0, c.h0, 0);
      case Pass::kTrial:
        return begin(first_step(c.h0, c.d1, fabs(mixed_norm(0) / c.h0), tableau.order));
      case Pass::kStep: {
        c.nfe += stages() - 1;
        if (totals()[second()] != 0) return end(Status::kInterrupted);
        const double ratio = mixed_norm(0);
        if (!control.judge(ratio)) {
          c.rejected += 1;
          return propose();
        }
        move(control.last_dt);
        c.jump = control.at_jump;
        if (ratio - ratio == 0) return c.jump ? jump() : propose();
        c.checked = 0;  // a step that was forced
        return next_task(Pass::kCount, 0, 0, bad() + 1, 0, 0, 0);
      }
      case Pass::kCount:
        c.all_finite = totals()[bad()] == 0;
        return c.jump ? jump() : propose();
      case Pass::kJump:
        c.nfe += 1;
        return propose();
      case Pass::kGrid:
        c.nfe += stages();
        move(c.task.dt);
        return go_on();
      default:
        return end(Status::kOk);
    }
  }
  // the derivative behind a jump; the outputs of the step before it need the one from before
  SF_DEVICE void jump() {
    common().jump = 0;
    next_task(Pass::kJump, 1, 0, 0, double(after(T(common().control.t1))), 0, 0);
  }

  // ---- outputs

  SF_DEVICE void record(T* to, int at, const T* rows_) {
    if (in.record && at <= in.capacity) store_rows(rows_, dim(), to + size_t(at) * in.batch * dim());
  }
  // The tile's outputs, read off the last step: y0 and y1 (f0, f1) have changed places in it.
  SF_DEVICE void write(int index) {
    const StepController& control = common().control;
    const bool is_first = index == 0;
    const double t0 = tableau.adaptive ? control.t0 : in.times[in.n_times + int(common().accepted) - 1];
    const double t1 = tableau.adaptive ? control.t1 : in.times[in.n_times + int(common().accepted)];
    const T x = T((time(index) - t0) / (t1 - t0)), dt = T(control.last_dt);
    const T in_b = -T(10) * x + T(42) * x * x - T(32) * x * x * x, in_mid = T(32) * x - T(96) * x * x + T(64) * x * x * x;
    const T in_fa = T(1) - T(8) * x + T(15) * x * x - T(8) * x * x * x, in_fb = T(2) * x - T(9) * x * x + T(8) * x * x * x;
    // of the tile's arrays, by their distance from the first: fewer registers than five addresses
    const T* const arrays = part(0);
    const int n = size(), turn = common().turn, of_a = turn ? 0 : 2 * n, of_b = 2 * n - of_a;
#pragma unroll 1
    for (int i = threadIdx.x; i < count() * rows(); i += blockDim.x) {
      const int s = i / rows(), c = i - s * rows(), j = c * S() + s;
      const size_t sample = size_t(index) * in.batch + first_sample() + s;
      const T ya = arrays[of_a + j], yb = arrays[of_b + j];
      T value = yb;
      if (!is_first && !tableau.adaptive) {
        if (time(index) == t0) value = ya;
        else if (time(index) != t1) value = ya + x * (yb - ya);
      } else if (!is_first) {  // the quartic through y0, y1, mid, f0, f1, and its derivative
        const T ym = arrays[4 * n + j], fa = arrays[of_a + n + j], fb = arrays[of_b + n + j], da = dt * fa, db = dt * fb;
        // Hairer's form: coefficients of the quartic in x
        const T c4 = T(2) * (db - da) - T(8) * (yb + ya) + T(16) * ym;
        const T c3 = T(5) * da - T(3) * db + T(18) * ya + T(14) * yb - T(32) * ym;
        const T c2 = db - T(4) * da - T(11) * ya - T(5) * yb + T(16) * ym;
        value = ya + x * (da + x * (c2 + x * (c3 + x * c4)));
        if (in.record) {
          const T slope = (in_b * (yb - ya) + in_mid * (ym - ya)) / dt + in_fa * fa + in_fb * fb;
          if (c < dim()) in.x_slopes[sample * dim() + c] = slope;
          else in.l_slopes[sample] = slope;
        }
      }
      if (c < dim()) in.xs[sample * dim() + c] = value;
      else in.ls[sample] = value;
    }
  }
  // Outputs a failed solve did not come to are NaN.
  SF_DEVICE void leave_nothing(int index) {
    for (int i = threadIdx.x; i < count() * dim(); i += blockDim.x) in.xs[(size_t(index) * in.batch + first_sample()) * dim() + i] = T(NAN);
    if (program.divergence)
      for (int s = threadIdx.x; s < count(); s += blockDim.x) in.ls[size_t(index) * in.batch + first_sample() + s] = T(NAN);
  }

  // What is known of a tile by now, and was not before.
  SF_DEVICE void deliver_tile() {
    const int accepted = int(common().accepted), last = common().last_output;
    const bool done = common().task.pass == Pass::kDone;
    if (common().moved && tableau.adaptive) record(in.derivatives, accepted - 1, f1());
    if (common().moved || (last == 1 && common().first_output == 0)) record(in.states, accepted, y0());
    for (int index = common().first_output; index < last; ++index) write(index);
    if (!done) return;
    if (tableau.adaptive) record(in.derivatives, accepted, f0());
    if (common().status != Status::kOk)
      for (int index = common().index; index < in.n_times; ++index) leave_nothing(index);
  }

  // ---- from the outside

  // The whole of one initial value problem, or an evaluation.
  SF_DEVICE void solve(SolveStats* stats) {
    if (threadIdx.x == 0) {
      Common<T>& c = common();
      c.nfe = c.accepted = c.rejected = 0;
      c.turn = c.checked = c.jump = 0;
      c.index = 1;
      c.control = {};
      c.control.rule = in.rule;
      c.control.order = tableau.order;
      c.control.step_t = {in.times + in.n_times + in.n_grid, in.n_step_t};
      c.control.jump_t = {in.times + in.n_times + in.n_grid + in.n_step_t, in.n_jump_t};
      if (in.evaluate) next_task(Pass::kEvaluation, 1, 0, 0, 0, 0, 0);
      else if (tableau.adaptive) next_task(Pass::kStart, 1, 2, bad() + 1, time(0), 0, 0);
      else next_task(Pass::kLoad, 0, 0, 0, 0, 0, 0);
    }
    sync();
    loaded = -1;
    do {
      take();
      if (threadIdx.x == 0) decide();
      sync();
      if (in.evaluate) return;
      do deliver_tile();
      while (next_tile());
    } while (common().task.pass != Pass::kDone);
    if (threadIdx.x == 0 && (in.control != Control::kShared || blockIdx.x == 0)) {
      const Common<T>& c = common();
      const bool ends_well = c.status == Status::kOk;
      *stats = {c.nfe, c.accepted, c.rejected, double(int(c.status)), tableau.adaptive || !ends_well ? c.control.t1 : 0.0, tableau.adaptive ? c.control.dt : 0.0,
                double(c.barriers), 0};
    }
    sync();
  }

  SF_DEVICE void run() {
    if (threadIdx.x == 0) common().barriers = 0;
    block.begin();
    const bool alone = !in.evaluate && in.control != Control::kShared;  // tiles step on their own
    tile = blockIdx.x;
    do {
      if (alone) {
        sync();
        if (threadIdx.x == 0) common().next_tile = atomicAdd(in.next_tile, 1);
        sync();
        tile = common().next_tile;
        if (tile >= in.tiles) return;
      }
      solve(in.stats + (alone ? tile : 0));
    } while (alone);
  }
};

template <class T, int V, bool Shared>
__global__ void __launch_bounds__(512, 1) solve_kernel(const __grid_constant__ SolveParams<T> params) {
  Integration<T, V, Shared>(params).run();
}

}  // namespace sparseflow::cuda
