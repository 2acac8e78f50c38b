// Mutated programs, under the address and undefined-behaviour sanitizers (`make sanitize`; `make fuzz` takes many more): what
// `validate` accepts packs and runs at every tile width, forwards and backwards, within its own memory; and a refusal says what
// is wrong.
//
//   sparseflow_fuzz_test [programs] [seed]
#include <cstdlib>
#include <memory>

#include "mutate.h"
#include "native_case.h"
#include "random_graph.h"

using namespace sparseflow;
using namespace sparseflow::testing;

namespace {

constexpr int64_t kManyRows = 1 << 16;  // beyond, one width has to do: memory is slow under a sanitizer

struct Count {
  int refused = 0, ran = 0, adjoints = 0;
};

template <class T>
std::vector<int> widths_to_run(Random& random, const Program<T>& p, const Kernels<T>& kernels) {
  int64_t rows = 0;
  for (const Buffer& b : p.buffers) rows += int64_t(b.rows) * b.slots;
  std::vector<int> widths;
  for (int w = 0; w < Kernels<T>::kWidths; ++w)
    if (!p.adjoint() || kernels.pull[0][0][w] != nullptr) widths.push_back(w);
  if (rows > kManyRows) widths = {widths[pick(random, 0, static_cast<int>(widths.size()) - 1)]};
  return widths;
}

// A time answer, whichever way the program wants it.
template <class T, class C>
void give_time(C& compiled, const Program<T>& p, const Kernels<T>& kernels) {
  compiled.set_refresh(externals_of(p));
  if (p.time_rows == 0 || p.time_external >= 0) return;
  Random random(1);
  compiled.set_time(std::make_shared<CompiledProgram<T>>(convert<T>(TimeAnswer(random, p.time_rows).program()), kernels));
}

template <class T>
void run_forwards(Random& random, const Program<T>& p, const Kernels<T>& kernels) {
  CompiledProgram<T> compiled(p, kernels);
  give_time(compiled, p, kernels);
  const int batch = pick(random, 1, 40), out = p.out_rows();
  const Case<T> all(random, batch, p.dim);
  const std::vector<T> context = random_states<T>(random, batch * p.context_rows());
  const T* const given = context.data();
  std::vector<T> f(batch * out), trace(batch), xs(3 * batch * p.dim), ls(3 * batch);
  for (int width : widths_to_run(random, p, kernels)) {
    compiled.force_width(width);
    compiled.evaluate(0.5, all.x.data(), all.noise.data(), batch, 1, f.data(), trace.data(), given);
    if (out != p.dim) continue;
    for (const Tableau& tableau : {bosh3(), euler()}) {
      SolveInput<T> in = all.input(tableau, 2);
      in.options.max_num_steps = 4;
      in.context = given;
      in.record = chance(random, 0.5);
      compiled.solve(in, xs.data(), ls.data());
    }
  }
}

template <class T>
void run_backwards(Random& random, const Program<T>& p, const Kernels<T>& kernels) {
  CompiledAdjoint<T> compiled(p, kernels);
  give_time(compiled, p, kernels);
  const int batch = pick(random, 1, 40), out = p.out_rows();
  const Case<T> all(random, batch, p.dim);
  const std::vector<T> context = random_states<T>(random, batch * p.context_rows()), grad_f = random_states<T>(random, batch * out);
  const T* const given = context.data();
  std::vector<T> grad_context(context);
  const Tableau tableaus[] = {bosh3(), euler()};
  const std::vector<T> grad_ls = random_states<T>(random, 3 * batch);
  std::vector<T> grad_x(batch * p.dim), grad_l(batch);
  for (int width : widths_to_run(random, p, kernels)) {
    compiled.force_width(width);
    compiled.evaluate(0.5, all.x.data(), all.noise.data(), batch, 1, grad_f.data(), all.l.data(), grad_x.data(), given, grad_context.data());
    if (out != p.dim) continue;
    for (const Tableau& tableau : tableaus) {
      SolveRecord<T> record;
      record.batch = batch, record.tableau = tableau, record.noise = all.noise.data(), record.context = given, record.times = {0.0, 0.5, 1.0};
      record.steps = {{0.0, 0.25}, {0.25, 0.75}};
      record.kept = tableau.adaptive ? pick(random, 1, 2) : 0;
      const std::vector<T> states = random_states<T>(random, 3 * batch * p.dim), derivatives = random_states<T>(random, 3 * record.kept * batch * p.dim);
      record.states = states.data(), record.derivatives = derivatives.data();
      compiled.solve(record, 2, states.data(), grad_ls.data(), grad_x.data(), grad_l.data(), grad_context.data());
    }
  }
}

template <class T>
void fuzz(Random& random, const Program<double>& good, const KernelSet& set, Count& count) {
  const Program<T> p = mutated<T>(random, good);
  if (p.externals > 1000) return;  // the callback's business
  const Kernels<T>& kernels = table_of<T>(set);
  const std::string refusal = thrown([&] { validate(p); });
  if (!refusal.empty()) {
    ++count.refused;
    check(refusal.rfind("program: ", 0) == 0, "a refusal that names the program, not: " + refusal);
    return;
  }
  ++(p.adjoint() ? count.adjoints : count.ran);
  const std::string error = thrown([&] { p.adjoint() ? run_backwards(random, p, kernels) : run_forwards(random, p, kernels); });
  check(error.empty() || error.rfind("refresh: ", 0) == 0, "what was accepted runs: " + error);
}

}  // namespace

int main(int arguments, char** argument) {
  const int programs = arguments > 1 ? std::atoi(argument[1]) : 3000;
  const unsigned seed = arguments > 2 ? unsigned(std::strtoul(argument[2], nullptr, 10)) : 20;
  const KernelSet* sets;
  const int n = available_sets(&sets);
  Count count;
  Random random(seed);
  for (int trial = 0; trial < programs; ++trial) {
    const int kind = pick(random, 0, 8);
    const Program<double> good = kind > 5 ? graph_program(random, kind == 6) : trial % 100 == 99 ? wide_program(random, pick(random, 0, 2)) : kind < 3 ? random_program(random, kind) : adjoint_program(random, kind == 4);
    const KernelSet& set = sets[pick(random, 0, n - 1)];
    chance(random, 0.5) ? fuzz<float>(random, good, set, count) : fuzz<double>(random, good, set, count);
  }
  check(count.refused * 5 > programs && count.ran * 20 > programs && count.adjoints * 20 > programs, "both sides are tried");
  std::printf("seed %u: %d refused, %d ran forwards, %d backwards; %d failed\n", seed, count.refused, count.ran, count.adjoints, failed);
  return failed == 0 ? 0 : 1;
}
