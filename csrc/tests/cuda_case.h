// What the tests of the CUDA kernels on the host share: memory of a device, launch shapes, launches, comparisons.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include "cpu/adjoint.h"
#include "cpu/solve.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/tableau.h"
#include "mutate.h"
#include "random_graph.h"

using namespace sparseflow;
using namespace sparseflow::testing;

namespace {

// Memory of a device: exactly as large as promised, so that the sanitizer sees any step beyond; full of NaNs at first.
template <class T>
struct Memory {
  explicit Memory(size_t n) : count(n), bytes(allocate(n * sizeof(T)), std::free) { std::memset(bytes.get(), 0xff, n * sizeof(T)); }
  Memory(const std::vector<T>& v) : Memory(v.size()) { std::copy(v.begin(), v.end(), data()); }
  T* data() const { return count > 0 ? reinterpret_cast<T*>(bytes.get()) : nullptr; }
  std::vector<T> vector() const { return std::vector<T>(data(), data() + count); }
  void clear() { std::memset(bytes.get(), 0, count * sizeof(T)); }

  size_t count;
  std::unique_ptr<char, void (*)(void*)> bytes;

 private:
  static char* allocate(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, std::max<size_t>(n, 1)) != 0) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
};

// Its last stage is not at the solution, so that a step's first derivative is not the field's at the state.
Tableau heun() {
  Tableau t;
  t.order = 2;
  t.c = {1.0};
  t.a = {{1.0}};
  t.b = {0.5, 0.5};
  t.b_error = {0.5, -0.5};
  t.b_mid = {0.5, 0.0};
  return t;
}

// What a kernel cannot ask anybody becomes numbers.
Program<double> without_externals(Random& random, Program<double> p) {
  for (auto& m : p.modulations) {
    if (m.external_gate >= 0) m.gate_slope = numbers(random, m.n), m.gate_offset = numbers(random, m.n);
    if (m.external_shift >= 0) m.shift_slope = numbers(random, m.n), m.shift_offset = numbers(random, m.n);
    m.external_gate = m.external_shift = -1;
  }
  for (auto& m : p.matrices) {
    if (!m.gated && m.external >= 0) m.values = numbers(random, m.nnz());
    m.external = -1;
  }
  p.externals = 0;
  return p;
}

template <class T>
const Kernels<T>& reference_kernels() {
  const KernelSet* sets;
  available_sets(&sets);
  if constexpr (sizeof(T) == 4) return *sets[0].f32;
  else return *sets[0].f64;
}

// A program on its device, and one way to launch it.
template <class T>
struct Loaded {
  cuda::Image<T> image;
  Memory<char> memory;
  cuda::DeviceProgram program;

  explicit Loaded(cuda::Image<T> i) : image(std::move(i)), memory(image.bytes), program(image.program) { program.image = memory.data(); }
};

struct Way {
  cuda::Shape shape;
  int limit;  // bytes of shared memory
};

// The shapes a precision has, each with all of a block's shared memory, with as little as it can do with (whatever can be is
// in global memory, weights come in pieces), and with something between.
template <class T>
std::vector<Way> ways(Random& random, const cuda::Image<T>& image, bool adjoint, bool per_sample, int batch, int stages) {
  std::vector<Way> found;
  for (int i = 0; i < cuda::kShapeCount; ++i) {
    const cuda::Shape& shape = cuda::kShapes[i];
    if (shape.per_thread != (sizeof(T) == 8 || per_sample ? 1 : 4) || (shape.tile == 1) != per_sample) continue;
    auto fits = [&](int limit) {
      cuda::Device device;
      device.shared_per_block = limit;
      bool fit = false;
      cuda::plan_for(image, shape, device, batch, stages, adjoint, false, fit);
      return fit;
    };
    constexpr int kGrain = 128;  // a device's is a multiple of it
    const int all = cuda::Device().shared_per_block / kGrain;
    if (!fits(all * kGrain)) continue;
    int low = 0, high = all;
    while (low + 1 < high) (fits((low + high) / 2 * kGrain) ? high : low) = (low + high) / 2;
    for (int grains : {all, high, pick(random, high, std::min(all, 2 * high))})
      if (fits(grains * kGrain)) found.push_back({shape, grains * kGrain});
  }
  return found;
}

template <class T>
cuda::Plan plan_of(const cuda::Image<T>& image, const Way& way, int batch, int stages, bool adjoint, bool per_tile) {
  cuda::Device device;
  device.shared_per_block = way.limit;
  bool fits = false;
  cuda::Plan plan = cuda::plan_for(image, way.shape, device, batch, stages, adjoint, per_tile, fits);
  check(fits, "a plan that fitted: " + plan.reason);
  check(plan.block.shared_bytes <= way.limit, "no more shared memory than there is");
  return plan;
}

cuda::Instance instance_of(const cuda::Plan& plan) { return {plan.shape.per_thread, plan.work_in_shared}; }

std::string name_of(const cuda::Plan& p) {
  return std::to_string(p.shape.tile) + "," + std::to_string(p.shape.per_thread) + "," + std::to_string(p.shape.parts) + "," + std::to_string(p.shape.threads) +
         (p.work_in_shared ? "" : " global") + (p.block.resident ? "" : " streamed");
}

struct States {
  int batch;
  std::vector<double> x, l, noise;
  States(Random& random, int n, int dim) : batch(n), x(random_states<double>(random, n * dim)), l(random_states<double>(random, n)), noise(random_states<double>(random, n * dim)) {}
  States rows(int first, int n, int dim) const {
    States s(*this);
    s.batch = n;
    s.x.assign(x.begin() + first * dim, x.begin() + (first + n) * dim);
    s.noise.assign(noise.begin() + first * dim, noise.begin() + (first + n) * dim);
    s.l.assign(l.begin() + first, l.begin() + first + n);
    return s;
  }
};
template <class T, class Numbers>
std::vector<T> as(const Numbers& v) {
  return std::vector<T>(v.begin(), v.end());
}

// ---------------------------------------------------------------------------------------------------------- launches

template <class T>
struct Evaluated {
  std::vector<T> f, trace;
};
template <class T>
Evaluated<T> evaluate(const Loaded<T>& on, const cuda::Plan& plan, int blocks, const States& states, double t) {
  const int dim = on.program.dim;
  const Memory<T> x(as<T>(states.x)), noise(as<T>(states.noise)), f(states.x.size()), trace(states.batch), time(std::vector<T>{T(t)});
  const Memory<char> global(size_t(blocks) * plan.block.global_bytes);
  cuda::SolveParams<T> p;
  p.program = on.program, p.plan = plan.block, p.batch = states.batch, p.tiles = plan.tiles;
  p.x = x.data(), p.noise = noise.data(), p.global = global.data();
  p.evaluate = true;
  p.f = f.data(), p.f_trace = on.program.divergence ? trace.data() : nullptr;
  if (dim % 2 != 0) p.time = time.data();
  else p.time_value = T(t);
  cuda::launch_solve<T>(p, instance_of(plan), {0, blocks, nullptr, false});
  return {f.vector(), trace.vector()};
}

struct Problem {
  Tableau tableau;
  std::vector<double> times{0.25, 0.5, 0.6875}, grid{0.25, 0.375, 0.5625, 0.6875}, step_t, jump_t;
  int sign = -1, max_num_steps = 60;
  bool perturb = false;
  double tolerance = 1e-3;
};

template <class T>
SolveInput<T> input_of(const Problem& problem, const States& states) {
  SolveInput<T> in;
  static_assert(sizeof(T) == 8);
  in.batch = states.batch;
  in.x = states.x.data(), in.l = states.l.data(), in.noise = states.noise.data();
  in.times = problem.times, in.grid = problem.grid, in.tableau = problem.tableau, in.sign = problem.sign, in.perturb = problem.perturb;
  in.rtol = in.atol = {problem.tolerance, problem.tolerance};
  in.options.max_num_steps = problem.max_num_steps, in.options.step_t = problem.step_t, in.options.jump_t = problem.jump_t;
  return in;
}

template <class T>
struct Solved {
  std::vector<T> xs, ls, states, derivatives, x_slopes;
  std::vector<double> steps;
  std::vector<cuda::SolveStats> stats;
};
template <class T>
Solved<T> solve(const Loaded<T>& on, const cuda::Plan& plan, int blocks, const States& states, const Problem& problem, bool shared, bool record, int capacity = 80) {
  const int dim = on.program.dim, batch = states.batch, outputs = static_cast<int>(problem.times.size()), rows = dim + on.program.divergence;
  std::vector<double> points(problem.times);
  const std::vector<double> grid = problem.tableau.adaptive ? std::vector<double>() : problem.grid;
  for (const auto& more : {grid, problem.step_t, problem.jump_t}) points.insert(points.end(), more.begin(), more.end());
  if (!problem.tableau.adaptive) capacity = static_cast<int>(grid.size()) - 1;
  const Memory<T> x(as<T>(states.x)), l(as<T>(states.l)), noise(as<T>(states.noise)), xs(size_t(outputs) * batch * dim), ls(size_t(outputs) * batch);
  const Memory<char> global(size_t(blocks) * plan.block.global_bytes);
  const Memory<T> tile_state(shared && plan.tiles > blocks ? size_t(plan.tiles) * 5 * rows * plan.shape.tile : 0);
  const Memory<double> times(points), blame(2 * size_t(batch)), slots(2 * size_t(cuda::kSums) * blocks), steps(2 * size_t(capacity));
  const Memory<cuda::SolveStats> stats(shared ? 1 : plan.tiles);
  const Memory<unsigned long long> barrier(std::vector<unsigned long long>{0});
  const Memory<int> next(std::vector<int>{0});
  const size_t kept = record ? size_t(capacity + 1) * batch * dim : 0;
  Memory<T> record_states(kept), derivatives(problem.tableau.adaptive ? kept : 0), x_slopes(record && problem.tableau.adaptive ? xs.count : 0), l_slopes(x_slopes.count / std::max(1, dim));
  cuda::SolveParams<T> p;
  p.program = on.program, p.plan = plan.block, p.batch = batch, p.tiles = plan.tiles;
  p.x = x.data(), p.l = on.program.divergence ? l.data() : nullptr, p.noise = noise.data(), p.global = global.data();
  p.control = shared ? cuda::Control::kShared : cuda::Control::kPerTile;
  p.tableau = cuda::device_tableau(problem.tableau);
  p.add_component(on.program.dim, problem.tolerance, problem.tolerance);
  if (on.program.divergence) p.add_component(1, problem.tolerance, problem.tolerance);
  p.rule.max_num_steps = problem.max_num_steps;
  p.first_step = std::nan("");
  p.sign = problem.sign, p.perturb = problem.perturb;
  p.n_times = outputs, p.n_grid = static_cast<int>(grid.size());
  p.n_step_t = static_cast<int>(problem.step_t.size()), p.n_jump_t = static_cast<int>(problem.jump_t.size());
  p.times = times.data(), p.xs = xs.data(), p.ls = ls.data(), p.tile_state = tile_state.data(), p.blame = blame.data(), p.stats = stats.data();
  p.slots = slots.data(), p.barrier = barrier.data(), p.next_tile = next.data();
  p.record = record, p.capacity = p.step_capacity = capacity, p.steps = shared ? steps.data() : nullptr;
  p.states = record_states.data(), p.derivatives = derivatives.data(), p.x_slopes = x_slopes.data(), p.l_slopes = on.program.divergence ? l_slopes.data() : nullptr;
  cuda::launch_solve<T>(p, instance_of(plan), {0, blocks, nullptr, shared && blocks > 1});
  return {xs.vector(), ls.vector(), record_states.vector(), derivatives.vector(), x_slopes.vector(), steps.vector(), stats.vector()};
}

template <class T>
struct Pulled {
  std::vector<T> x, l;
  std::vector<double> sums;  // of all blocks
};
template <class T>
Pulled<T> backward(const Loaded<T>& on, const cuda::Plan& plan, int blocks, const States& states, const std::function<void(cuda::AdjointParams<T>&)>& fill) {
  const size_t of_block = on.program.lasting_sums + on.program.totals;
  const Memory<T> noise(as<T>(states.noise)), grad_x(states.x.size()), grad_l(states.batch);
  Memory<T> sums(blocks * of_block), stage_sums(size_t(blocks) * on.program.stage_sums);
  sums.clear(), stage_sums.clear();
  const Memory<char> global(size_t(blocks) * plan.block.global_bytes);
  cuda::AdjointParams<T> p;
  p.program = on.program, p.plan = plan.block, p.batch = states.batch, p.tiles = plan.tiles;
  p.noise = on.program.noise.row >= 0 ? noise.data() : nullptr;
  p.global = global.data(), p.sums = sums.data(), p.stage_sums = stage_sums.data();
  p.grad_x = grad_x.data(), p.grad_l = on.program.divergence ? grad_l.data() : nullptr;
  fill(p);
  cuda::launch_adjoint<T>(p, instance_of(plan), {0, blocks, nullptr, false});
  Pulled<T> out{grad_x.vector(), grad_l.vector(), std::vector<double>(of_block, 0.0)};
  for (int b = 0; b < blocks; ++b)
    for (size_t i = 0; i < of_block; ++i) out.sums[i] += double(sums.data()[b * of_block + i]);
  return out;
}

// -------------------------------------------------------------------------------------------------------- comparisons

template <class T>
bool close(const std::vector<T>& found, const std::vector<double>& wanted, double bound) {
  if (found.size() != wanted.size()) return false;
  double largest = 1, worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(wanted[i])) {
      if (std::isfinite(double(found[i]))) return false;
      continue;
    }
    largest = std::max(largest, std::fabs(wanted[i]));
    worst = std::max(worst, std::fabs(double(found[i]) - wanted[i]));
  }
  return worst <= bound * largest;  // also false for a NaN
}
template <class T>
bool close_bits(const Solved<T>& a, const Solved<T>& b) {
  return same(a.xs, b.xs) && same(a.ls, b.ls) && same(a.states, b.states) && same(a.derivatives, b.derivatives) && same(a.x_slopes, b.x_slopes) && same(a.steps, b.steps);
}

void order_of_threads(int seed) { setenv("SPARSEFLOW_SHIM_SEED", std::to_string(seed).c_str(), 1); }

}  // namespace
