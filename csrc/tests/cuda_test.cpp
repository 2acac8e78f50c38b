// The CUDA kernels on the host (cuda_host/shim.h), meant to run under the address and undefined-behaviour sanitizers and, in
// another build, under the search for races: random programs in every launch shape against the CPU's compiled programs in
// double, in several orders of threads; and programs with one number spoiled, which must be refused or run without touching
// foreign memory. CMake's target is sparseflow_cuda_test; by hand, in csrc, with S="-O1 -g -fsanitize=address,undefined
// -fno-sanitize-recover=all" (or nothing) and F="-std=c++17 $S -I. -DSPARSEFLOW_HOST_SHIM -Wno-unknown-pragmas":
//   for f in cuda/*.cpp cuda/*.cu $(ls tests/cuda_host/*.cpp | grep -v _test) tests/cuda_test.cpp; do
//     g++ $F -x c++ -c $f -o $(basename $f).o; done
//   g++ $F *.o <objects of csrc/*.cpp and csrc/cpu, as for sparseflow_native_test> -o cuda_test -pthread
// For races: S="-O1 -g", the .cu also with -fsanitize=thread, the shim's with -DSHIM_RACES, link with -rdynamic -ldl.
// Argument: "quick" for a tenth of the programs.
#include "cuda_graphs.h"

namespace {

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
