// The CUDA kernels on the host (cuda_host/shim.h), meant to run under the address and undefined-behaviour sanitizers and, in
// another build, under the search for races: random programs in every launch shape against the CPU's compiled programs in
// double, in several orders of threads; and programs with one number spoiled, which must be refused or run without touching
// foreign memory. CMake's target is sparseflow_cuda_test; by hand, in csrc, with S="-O1 -g -fsanitize=address,undefined
// -fno-sanitize-recover=all" (or nothing) and F="-std=c++17 $S -I. -DSPARSEFLOW_HOST_SHIM -Wno-unknown-pragmas":
//   for f in cuda/*.cpp cuda/*.cu tests/cuda_host/shim.cpp tests/cuda_test.cpp; do g++ $F -x c++ -c $f -o $(basename $f).o; done
//   g++ $F *.o <objects of csrc/*.cpp and csrc/cpu, as for sparseflow_native_test> -o cuda_test -pthread
// For races: S="-O1 -g", the .cu also with -fsanitize=thread, shim.cpp with -DSHIM_RACES, link with -rdynamic -ldl.
// Argument: "quick" for a tenth of the programs.
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
  for (int c = 0; c < 2; ++c) p.rtol[c] = p.atol[c] = problem.tolerance;
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

// By how much the CPU's kernels in the same precision miss what double precision finds, in units of the largest number.
double error_of(const std::vector<float>& found, const std::vector<double>& wanted) {
  double largest = 1, worst = 0;
  for (size_t i = 0; i < found.size(); ++i)
    if (std::isfinite(wanted[i])) largest = std::max(largest, std::fabs(wanted[i])), worst = std::max(worst, std::fabs(double(found[i]) - wanted[i]));
  return worst / largest;
}

template <class T>
void test_program(Random& random, const Program<double>& meaning, const std::string& name) {
  constexpr bool exact = sizeof(T) == 8;
  CompiledProgram<double> reference(meaning, reference_kernels<double>());
  const Program<T> program = convert<T>(meaning);
  const size_t pieces[] = {64, 300, cuda::kUncut};
  const size_t piece = pieces[pick(random, 0, 2)];
  const double dense = chance(random, 0.5) ? 0.3 : 2.0;
  const Loaded<T> on(cuda::make_image(program, piece, dense));
  const std::string full = name + (dense < 1 ? " dense" : "") + " pieces of " + std::to_string(piece);
  CompiledProgram<float> single(convert<float>(meaning), reference_kernels<float>());
  const int dim = meaning.dim;

  auto all = ways(random, on.image, false, false, 100, 4);
  for (const Way& way : ways(random, on.image, false, true, 100, 4)) all.push_back(way);
  check(!all.empty(), full + ": some shape fits");
  std::shuffle(all.begin(), all.end(), random);
  for (size_t i = 0; i < std::min<size_t>(all.size(), 3); ++i) {
    const int tile = all[i].shape.tile, batches[] = {1, std::max(1, tile - 1), tile, tile + 1, 5 * tile - 1};
    const States states(random, std::min(batches[pick(random, 0, 4)], 70), dim);
    const cuda::Plan plan = plan_of(on.image, all[i], states.batch, 1, false, false);
    const std::string what = full + " " + name_of(plan) + " batch " + std::to_string(states.batch);
    std::vector<double> f(states.x.size()), trace(states.batch);
    reference.evaluate(0.375, states.x.data(), states.noise.data(), states.batch, 1, f.data(), meaning.divergence ? trace.data() : nullptr);
    double bounds[2] = {1e-11, 1e-10};
    if (!exact) {
      const std::vector<float> x = as<float>(states.x), noise = as<float>(states.noise);
      std::vector<float> f32(f.size()), trace32(trace.size());
      single.evaluate(0.375f, x.data(), noise.data(), states.batch, 1, f32.data(), meaning.divergence ? trace32.data() : nullptr);
      bounds[0] = 1e-5 + 8 * error_of(f32, f);
      bounds[1] = 1e-5 + 8 * error_of(trace32, trace);
    }
    Evaluated<T> first;
    for (int seed : {0, 5}) {
      order_of_threads(seed);
      for (int blocks : {1, std::min(2, plan.tiles)}) {
        const Evaluated<T> found = evaluate(on, plan, blocks, states, 0.375);
        if (first.f.empty()) first = found;
        check(same(found.f, first.f) && same(found.trace, first.trace), what + ": bits of an evaluation");
      }
    }
    check(close(first.f, f, bounds[0]), what + ": f");
    if (meaning.divergence) check(close(first.trace, trace, bounds[1]), what + ": trace");
  }

  const Way& way = all[0];
  const int tile = way.shape.tile;
  Problem problem;
  const Tableau tableaus[] = {bosh3(), heun(), euler()};
  problem.tableau = tableaus[pick(random, 0, 2)];
  if (!exact && problem.tableau.adaptive && chance(random, 0.5)) problem.tableau = euler();
  problem.perturb = chance(random, 0.5);
  if (chance(random, 0.3)) problem.step_t = {0.3, 0.45};
  if (chance(random, 0.3)) problem.jump_t = {0.4};
  const int sizes[] = {1, tile, 3 * tile + 1, 4 * tile};
  const States states(random, std::min(sizes[pick(random, 0, 3)], 70), dim);
  const int stages = problem.tableau.stages();
  std::vector<double> xs(problem.times.size() * states.x.size()), ls(problem.times.size() * states.batch);
  const SolveOutput<double> wanted = reference.solve(input_of<double>(problem, states), xs.data(), ls.data());
  const cuda::Plan plan = plan_of(on.image, way, states.batch, stages, false, false);
  const std::string what = full + " " + name_of(plan) + " solve of " + std::to_string(states.batch);
  for (int blocks : {std::min(plan.tiles, 3), 1}) {
    Solved<T> first;
    for (int seed : {0, 9}) {
      order_of_threads(seed);
      const Solved<T> found = solve(on, plan, blocks, states, problem, true, true);
      if (seed == 0) first = found;
      check(close_bits(found, first), what + ": bits");
    }
    const cuda::SolveStats& s = first.stats[0];
    const bool ok = wanted.status == "ok";
    if (exact) {
      check((s.status == 0) == ok && s.nfe == double(wanted.nfe) && s.accepted == double(wanted.accepted) && s.rejected == double(wanted.rejected),
            what + ": counts " + std::to_string(s.nfe) + " " + std::to_string(wanted.nfe) + " " + wanted.status);
    }
    if (exact && ok) {
      check(close(first.xs, xs, 1e-8), what + ": xs");
      if (meaning.divergence) check(close(first.ls, ls, 1e-7), what + ": ls");
    }
    if (exact && problem.tableau.adaptive)
      for (size_t i = 0; i < wanted.steps.size() && i < 80; ++i)
        check(std::fabs(first.steps[2 * i] - wanted.steps[i].first) <= 1e-6 && std::fabs(first.steps[2 * i + 1] - wanted.steps[i].second) <= 1e-6, what + ": steps");
    solve(on, plan, blocks, states, problem, true, true, 1);  // more steps than there is room for
    solve(on, plan, blocks, states, problem, true, false, 1);
  }
  order_of_threads(0);
  const Solved<T> found = solve(on, plan, std::min(plan.tiles, 2), states, problem, false, false);
  if (!exact) return;
  for (int which = 0; which < plan.tiles; ++which) {
    const int first = which * tile, n = std::min(tile, states.batch - first), outputs = static_cast<int>(problem.times.size());
    const States part = states.rows(first, n, dim);
    std::vector<double> part_xs(outputs * part.x.size()), part_ls(outputs * n);
    const SolveOutput<double> alone = reference.solve(input_of<double>(problem, part), part_xs.data(), part_ls.data());
    const cuda::SolveStats& s = found.stats[which];
    check((s.status == 0) == (alone.status == "ok") && s.nfe == double(alone.nfe), what + ": counts of a tile alone");
    if (alone.status != "ok") continue;
    std::vector<T> own;
    for (int o = 0; o < outputs; ++o) own.insert(own.end(), found.xs.begin() + (o * states.batch + first) * dim, found.xs.begin() + (o * states.batch + first + n) * dim);
    check(close(own, part_xs, 1e-8), what + ": a tile alone");
  }
}

template <class T>
void compare_gradients(const Loaded<T>& on, const Pulled<T>& found, const ProgramGradient<double>& wanted, double bound, const std::string& what) {
  auto part = [&](const typename cuda::Image<T>::Range& range) {
    return range.first < 0 ? std::vector<double>() : std::vector<double>(found.sums.begin() + range.first, found.sums.begin() + range.first + range.size);
  };
  for (size_t m = 0; m < wanted.matrices.size(); ++m)
    if (!wanted.matrices[m].empty()) check(close(part(on.image.matrix_gradients[m]), wanted.matrices[m], bound), what + ": gradient of a matrix");
  for (size_t m = 0; m < wanted.modulations.size(); ++m) {
    const auto& w = wanted.modulations[m];
    const auto& r = on.image.time_gradients[m];
    const std::pair<const std::vector<double>*, typename cuda::Image<T>::Range> pairs[] = {
        {&w.bias, on.image.bias_gradients[m]}, {&w.gate_slope, r.gate_slope}, {&w.gate_offset, r.gate_offset}, {&w.shift_slope, r.shift_slope}, {&w.shift_offset, r.shift_offset}};
    for (const auto& [values, range] : pairs)
      if (!values->empty()) check(close(part(range), *values, bound), what + ": gradient of a modulation");
  }
  check(close(std::vector<double>{found.sums.back()}, {wanted.t}, bound * 10), what + ": gradient of t");
}

template <class T>
void test_adjoint(Random& random, const Program<double>& meaning, const std::string& name) {
  constexpr bool exact = sizeof(T) == 8;
  const double bound = exact ? 1e-9 : 2e-4;
  const Program<T> program = convert<T>(meaning);
  const size_t pieces[] = {64, 300, cuda::kUncut};
  const Loaded<T> on(cuda::make_image(program, pieces[pick(random, 0, 2)], chance(random, 0.5) ? 0.3 : 2.0));
  CompiledAdjoint<double> reference(meaning, reference_kernels<double>());
  Program<double> plain = meaning;  // the same field, to be solved
  plain.keep.clear(), plain.reverse.clear(), plain.sums.clear();
  plain.cotangent = plain.noise = -1, plain.divergence = false;
  plain.buffers[plain.input].slots = 1;
  CompiledProgram<double> field(plain, reference_kernels<double>());
  const int dim = meaning.dim;

  auto all = ways(random, on.image, true, false, 100, 4);
  check(!all.empty(), name + ": some shape fits");
  std::shuffle(all.begin(), all.end(), random);
  for (size_t i = 0; i < std::min<size_t>(all.size(), 2); ++i) {
    const int tile = all[i].shape.tile, sizes[] = {1, tile + 1, 3 * tile};
    const States states(random, std::min(sizes[pick(random, 0, 2)], 70), dim);
    const std::vector<double> grad_f = random_states<double>(random, states.batch * dim), grad_trace = random_states<double>(random, states.batch);
    const Memory<T> x(as<T>(states.x)), of_f(as<T>(grad_f)), of_trace(as<T>(grad_trace));
    cuda::Plan plan = plan_of(on.image, all[i], states.batch, 1, true, false);
    std::string what = name + " " + name_of(plan) + " batch " + std::to_string(states.batch);
    std::vector<double> grad_x(states.x.size());
    const auto wanted = reference.evaluate(0.25, states.x.data(), states.noise.data(), states.batch, 1, grad_f.data(), meaning.divergence ? grad_trace.data() : nullptr, grad_x.data());
    Pulled<T> first;
    for (int seed : {0, 3}) {
      order_of_threads(seed);
      const Pulled<T> found = backward<T>(on, plan, std::min(plan.tiles, 2), states, [&](cuda::AdjointParams<T>& p) {
        p.evaluate = true;
        p.tableau = {};
        p.tableau.stages = 1;
        p.x = x.data(), p.grad_f = of_f.data(), p.grad_trace = meaning.divergence ? of_trace.data() : nullptr;
        p.time_value = T(0.25);
      });
      if (seed == 0) first = found;
      check(same(found.x, first.x) && same(found.sums, first.sums), what + ": bits");
    }
    check(close(first.x, grad_x, bound), what + ": gradient of x");
    compare_gradients(on, first, wanted, bound, what);

    Problem problem;
    const Tableau tableaus[] = {bosh3(), heun(), euler()};
    problem.tableau = tableaus[pick(random, 0, 2)];
    problem.perturb = chance(random, 0.5);
    SolveInput<double> in = input_of<double>(problem, states);
    in.record = true;
    const size_t outputs = problem.times.size();
    std::vector<double> xs(outputs * states.x.size());
    const SolveOutput<double> out = field.solve(in, xs.data(), nullptr);
    if (out.status != "ok") continue;
    const std::vector<double> grad_xs = random_states<double>(random, static_cast<int>(xs.size())), grad_ls = random_states<double>(random, static_cast<int>(outputs) * states.batch);
    SolveRecord<double> record;
    record.batch = states.batch, record.sign = problem.sign, record.tableau = problem.tableau, record.perturb = problem.perturb, record.noise = states.noise.data();
    record.times = problem.times, record.steps = out.steps, record.states = out.states.data(), record.derivatives = out.derivatives.data();
    record.kept = static_cast<int>(out.derivatives.size() / out.states.size());
    std::vector<double> x0(states.x.size()), l0(states.batch), steps;
    const auto of_solve = reference.solve(record, 1, grad_xs.data(), meaning.divergence ? grad_ls.data() : nullptr, x0.data(), l0.data());
    for (const auto& [t, dt] : out.steps) steps.push_back(t), steps.push_back(dt);
    const Memory<double> times(problem.times), of_steps(steps);
    const Memory<T> kept_states(as<T>(out.states)), derivatives(as<T>(out.derivatives)), of_xs(as<T>(grad_xs)), of_ls(as<T>(grad_ls));
    plan = plan_of(on.image, all[i], states.batch, problem.tableau.stages(), true, false);
    what += " solve, " + std::to_string(out.steps.size()) + " steps of " + std::to_string(problem.tableau.stages());
    const Pulled<T> found = backward<T>(on, plan, std::min(plan.tiles, 2), states, [&](cuda::AdjointParams<T>& p) {
      p.tableau = cuda::device_tableau(problem.tableau);
      p.sign = problem.sign, p.perturb = problem.perturb, p.n_times = static_cast<int>(outputs), p.n_steps = static_cast<int>(out.steps.size());
      p.times = times.data(), p.steps = of_steps.data(), p.states = kept_states.data(), p.derivatives = derivatives.data();
      p.grad_xs = of_xs.data(), p.grad_ls = meaning.divergence ? of_ls.data() : nullptr;
    });
    check(close(found.x, x0, bound * 10), what + ": gradient of x");
    if (meaning.divergence) check(close(found.l, l0, bound * 10), what + ": gradient of l");
    compare_gradients(on, found, of_solve, bound * 10, what);
  }
}

template <class T>
void test_spoiled(Random& random, const Program<double>& good, int& refused, int& ran) {
  const Program<T> p = spoiled<T>(random, good);
  cuda::Image<T> image;
  bool made = false;
  const std::string message = thrown([&] { image = cuda::make_image(p, chance(random, 0.5) ? 64 : cuda::kUncut, chance(random, 0.5) ? 0.3 : 2.0), made = true; });
  if (!made) {
    ++refused;
    check(message.rfind("program: ", 0) == 0, "a refusal that names the program, not: " + message);
    return;
  }
  ++ran;
  if (image.program.workspace_rows > 20000) return;  // only slow
  const Loaded<T> on(std::move(image));
  const States states(random, 5, p.dim);
  const auto all = ways(random, on.image, good.adjoint(), false, 5, 4);
  if (all.empty()) return;
  const Way way = *std::min_element(all.begin(), all.end(), [](const Way& a, const Way& b) { return a.shape.threads < b.shape.threads; });
  order_of_threads(0);
  if (good.adjoint()) {
    const cuda::Plan plan = plan_of(on.image, way, 5, 1, true, false);
    const Memory<T> x(as<T>(states.x)), trace(as<T>(states.l));
    backward<T>(on, plan, 1, states, [&](cuda::AdjointParams<T>& q) {
      q.evaluate = true;
      q.tableau = {};
      q.tableau.stages = 1;
      q.x = q.grad_f = x.data(), q.grad_trace = p.divergence ? trace.data() : nullptr;
      q.time_value = T(0.5);
    });
    return;
  }
  evaluate(on, plan_of(on.image, way, 5, 1, false, false), 1, states, 0.5);
  Problem problem;
  problem.tableau = bosh3();
  problem.max_num_steps = 5;
  if (ran % 4 == 0) solve(on, plan_of(on.image, way, 5, 4, false, false), 2, states, problem, true, true);
}

void test_errors_of_a_solve(Random& random) {
  const Program<double> p = without_externals(random, random_program(random, 0));
  const Loaded<double> on(cuda::make_image(p, cuda::kUncut, 2.0));
  const Way way{{8, 1, 1, 256}, cuda::Device().shared_per_block};
  States states(random, 35, p.dim);
  states.x[21 * p.dim] = std::nan("");
  Problem problem;
  problem.tableau = bosh3();
  const cuda::Plan plan = plan_of(on.image, way, 35, 4, false, false);
  for (int blocks : {1, 3}) {
    Solved<double> found = solve(on, plan, blocks, states, problem, true, false);
    check(found.stats[0].status != 0 && std::isnan(found.xs.back()), "a row that is not a number ends a solve");
    found = solve(on, plan, blocks, states, problem, false, false);
    for (int tile = 0; tile < plan.tiles; ++tile) check((found.stats[tile].status != 0) == (tile == 2), "a tile ends alone");
    states.x[21 * p.dim] = 0.5;
    problem.max_num_steps = 0;
    check(solve(on, plan, blocks, states, problem, true, false).stats[0].status == double(int(cuda::Status::kMaxNumSteps)), "too many steps");
    problem.max_num_steps = 60;
    states.x[21 * p.dim] = std::nan("");
  }
}

// Graph programs at times of the samples' own, where they know a time, against the interpreter of random_graph.h.
template <class T>
void test_graph(Random& random, const Program<double>& p, const std::string& name) {
  constexpr double bound = sizeof(T) == 8 ? 1e-8 : 2e-3;
  const int out = p.out_rows(), given = p.context_rows();
  const size_t pieces[] = {64, 300, cuda::kUncut};
  const Loaded<T> on(cuda::make_image(convert<T>(p), pieces[pick(random, 0, 2)], chance(random, 0.5) ? 0.3 : 2.0));
  auto all = ways(random, on.image, p.adjoint(), false, 100, 4);
  check(!all.empty(), name + ": some shape fits");
  std::shuffle(all.begin(), all.end(), random);
  for (size_t i = 0; i < std::min<size_t>(all.size(), 2); ++i) {
    const int tile = all[i].shape.tile, sizes[] = {1, tile + 1, 3 * tile}, batch = std::min(sizes[pick(random, 0, 2)], 70);
    const cuda::Plan plan = plan_of(on.image, all[i], batch, 1, p.adjoint(), false);
    const std::string what = name + " " + name_of(plan) + " batch " + std::to_string(batch);
    const std::vector<T> x = random_states<T>(random, batch * p.dim), context = random_states<T>(random, batch * given), grad = random_states<T>(random, batch * out);
    GraphInterpreter interpreter(p, {});
    std::vector<double> f, trace, of_x, of_time, of_context;
    for (int s = 0; s < batch; ++s) {
      interpreter.begin(std::vector<double>(x.begin() + s * p.dim, x.begin() + (s + 1) * p.dim).data(), std::vector<double>(context.begin() + s * given, context.begin() + (s + 1) * given).data());
      interpreter.run(p.adjoint() ? p.keep : p.body);
      const auto& memory = interpreter.memory[0];
      trace.push_back(interpreter.trace);
      f.insert(f.end(), memory[p.output].begin(), memory[p.output].begin() + out);
      if (!p.adjoint()) continue;
      for (int c = 0; c < out; ++c) interpreter.memory[0][p.cotangent][c] = grad[s * out + c];
      interpreter.run(p.reverse);
      of_x.insert(of_x.end(), memory[p.state_cotangent].begin(), memory[p.state_cotangent].begin() + out);
      if (p.dim > out) of_time.push_back(memory[p.state_cotangent][out]);
      if (given > 0) of_context.insert(of_context.end(), memory[p.context_cotangent].begin(), memory[p.context_cotangent].end());
    }
    const Memory<T> at_x(x), at_context(context), at_grad(grad);
    const int blocks = std::min(plan.tiles, 2);
    const Memory<char> global(size_t(blocks) * plan.block.global_bytes);
    std::vector<T> first;
    for (int seed : {0, 3}) {
      order_of_threads(seed);
      if (!p.adjoint()) {
        const Memory<T> to(batch * out), to_trace(batch);
        cuda::SolveParams<T> q;
        q.program = on.program, q.plan = plan.block, q.batch = batch, q.tiles = plan.tiles;
        q.x = at_x.data(), q.context = at_context.data(), q.global = global.data();
        q.evaluate = true, q.own_times = p.dim > out;
        q.f = to.data(), q.f_trace = p.divergence ? to_trace.data() : nullptr;
        cuda::launch_solve<T>(q, instance_of(plan), {0, blocks, nullptr, false});
        check(close(to.vector(), f, bound), what + ": evaluation");
        if (p.divergence) check(close(to_trace.vector(), trace, 10 * bound), what + ": trace");
        if (seed == 0) first = to.vector();
        check(same(first, to.vector()), what + ": bits");
        continue;
      }
      const size_t of_block = on.program.lasting_sums + on.program.totals;
      const Memory<T> to_x(batch * out), to_times(batch);
      Memory<T> to_context(batch * given), sums(blocks * of_block), stage_sums(size_t(blocks) * on.program.stage_sums);
      to_context.clear(), sums.clear(), stage_sums.clear();
      cuda::AdjointParams<T> q;
      q.program = on.program, q.plan = plan.block, q.batch = batch, q.tiles = plan.tiles;
      q.x = at_x.data(), q.context = at_context.data(), q.grad_context = to_context.data(), q.global = global.data();
      q.sums = sums.data(), q.stage_sums = stage_sums.data();
      q.evaluate = true, q.own_times = p.dim > out, q.grad_times = to_times.data();
      q.tableau = {};
      q.tableau.stages = 1;
      q.grad_f = at_grad.data(), q.grad_x = to_x.data();
      cuda::launch_adjoint<T>(q, instance_of(plan), {0, blocks, nullptr, false});
      check(close(to_x.vector(), of_x, bound), what + ": gradient of x");
      check(close(to_context.vector(), of_context, bound), what + ": gradient of the context");
      if (p.dim > out) check(close(to_times.vector(), of_time, bound), what + ": gradient of the times");
      auto part = [&](const typename cuda::Image<T>::Range& range) {
        std::vector<T> found(range.first < 0 ? 0 : range.size);
        for (size_t k = 0; k < found.size(); ++k)
          for (int b = 0; b < blocks; ++b) found[k] += sums.data()[b * of_block + range.first + k];
        return found;
      };
      for (size_t m = 0; m < p.matrices.size(); ++m)
        if (p.matrices[m].sum >= 0) check(close(part(on.image.matrix_gradients[m]), interpreter.sums[p.matrices[m].sum], 10 * bound), what + ": gradient of a matrix");
      for (size_t v = 0; v < p.vectors.size(); ++v)
        if (p.vectors[v].sum >= 0) check(close(part(on.image.vector_gradients[v]), interpreter.sums[p.vectors[v].sum], 10 * bound), what + ": gradient of a row vector");
      if (seed == 0) first = to_x.vector();
      check(same(first, to_x.vector()), what + ": bits");
    }
  }
}

// Runs what a GPU's program may be; what only the CPU's engine runs is refused in words, and never misread.
void test_graphs(Random& random, int trials) {
  int ran = 0;
  for (int trial = 0; trial < trials; ++trial) {
    const Program<double> p = graph_program(random, trial % 2);
    const int more = p.dim - p.out_rows();
    const std::string message = thrown([&] { cuda::make_image(p, cuda::kUncut, 2.0); });
    if (p.time_rows > 0 || (more != 0 && more != 1) || (p.adjoint() && !p.prologue.empty())) {
      check(message.find("runs on the CPU only") != std::string::npos, "a graph is refused, not: " + message);
      continue;
    }
    if (message.find("registers") != std::string::npos) continue;  // which writers of programs know
    check(message.empty(), "a graph is laid out, not: " + message);
    ++ran;
    const std::string name = "graph " + std::to_string(trial);
    test_graph<float>(random, p, name + " float32");
    test_graph<double>(random, p, name + " float64");
  }
  check(ran >= trials / 20, std::to_string(ran) + " graphs ran");
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  Random random(7);
  for (int trial = 0; trial < (quick ? 6 : 40); ++trial) {
    const Program<double> p = without_externals(random, random_program(random, trial % 3));
    const std::string name = "program " + std::to_string(trial);
    test_program<float>(random, p, name + " float32");
    test_program<double>(random, p, name + " float64");
  }
  for (int trial = 0; trial < (quick ? 4 : 30); ++trial) {
    const Program<double> p = adjoint_program(random, trial % 2);
    const std::string name = "adjoint " + std::to_string(trial);
    test_adjoint<float>(random, p, name + " float32");
    test_adjoint<double>(random, p, name + " float64");
  }
  int refused = 0, ran = 0;
  for (int trial = 0; trial < (quick ? 60 : 1200); ++trial) {
    const Program<double> p = trial % 4 == 3 ? adjoint_program(random, trial % 8 == 3) : without_externals(random, random_program(random, trial % 3));
    test_spoiled<float>(random, p, refused, ran);
    test_spoiled<double>(random, p, refused, ran);
  }
  check(quick || (refused > 400 && ran > 100), std::to_string(refused) + " spoiled programs refused, " + std::to_string(ran) + " ran");
  test_errors_of_a_solve(random);
  test_graphs(random, quick ? 100 : 800);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
