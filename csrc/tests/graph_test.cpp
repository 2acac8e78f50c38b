// Graph programs without Python, meant to run under the address and undefined-behaviour sanitizers: every instruction, and
// random programs forwards and backwards, against a plain interpreter in double, for every instruction set and tile width.
#include <memory>

#include "native_case.h"
#include "random_graph.h"

using namespace sparseflow;
using namespace sparseflow::testing;

namespace {

template <class T>
struct GraphCase : Case<T> {
  std::vector<T> context;
  GraphCase(Random& random, int batch, const Program<double>& p)
      : Case<T>(random, batch, p.dim), context(random_states<T>(random, batch * p.context_rows())) {}
};

std::vector<double> widened(const double* from, int n) { return {from, from + n}; }
std::vector<double> widened(const float* from, int n) { return {from, from + n}; }

// Both ways to a time answer.
template <class T, class C>
void give_time(C& compiled, const Program<double>& p, const TimeAnswer& time, const KernelSet& set) {
  if (p.time_external >= 0)
    compiled.set_refresh([time](const std::vector<double>& times) {
      std::vector<std::vector<std::vector<T>>> answers;
      for (double t : times) {
        const std::vector<double> at = time.at(t);
        answers.push_back({std::vector<T>(at.begin(), at.end())});
      }
      return answers;
    });
  else if (p.time_rows > 0)
    compiled.set_time(std::make_shared<CompiledProgram<T>>(convert<T>(time.program()), table_of<T>(set)));
}

template <class T>
bool close(T found, double wanted, double size) {
  return std::fabs(double(found) - wanted) <= (sizeof(T) == 4 ? 1e-4 : 1e-11) * (1 + size);
}

// ---------------------------------------------------------------------------------------------------------- instructions

// Each instruction alone, over more rows than a strip and with all sorts of strides.
template <class T>
void test_instructions(Random& random, const KernelSet& set, const std::string& name) {
  for (int op = 0; op < kInstructs; ++op) {
    const InstructKind kind = kInstructKinds[op];
    for (int trial = 0; trial < 4; ++trial) {
      const int rows = pick(random, 1, 150), spare = pick(random, 0, 3), slots = pick(random, 1, 2);
      Program<double> p;
      p.dim = rows + spare, p.out = rows;
      p.input = add_buffer(p, p.dim, 1), p.output = add_buffer(p, rows, slots);
      p.vectors.push_back({rows + spare, numbers(random, rows + spare)});
      Expression e;
      e.inputs = 3, e.vectors = 1, e.outputs = 1, e.registers = 1;
      Instruction one{static_cast<Instruct>(op), 3, 0, uint16_t(kind.row_vector ? 0 : 1), 2, std::array<double, 5>{0.5, 2.0, -1.0, 1.25, 3.0}[pick(random, 0, 4)]};
      const bool through_register = chance(random, 0.5);
      if (through_register) one.to = 4;
      e.code.push_back(one);
      if (through_register) e.code.push_back({Instruct::kCopy, 3, 4, 0, 0, 0});
      p.expressions = {e};
      Op run;
      run.kind = OpKind::kPointwise;
      run.expression = 0, run.rows = rows;
      for (int i = 0; i < 3; ++i) run.inputs.push_back({{p.input, 0, pick(random, 0, spare)}, chance(random, 0.3)});
      run.vectors = {{0, pick(random, 0, spare), chance(random, 0.3)}};
      run.outputs = {{p.output, 0, 0}};
      p.body = {run};
      CompiledProgram<T> compiled(convert<T>(p), table_of<T>(set));
      const int batch = pick(random, 1, 130);
      Case<T> all(random, batch, p.dim);
      const double scale = trial < 2 ? 1 : 20;
      for (T& x : all.x) x = chance(random, 0.02) ? T(0) : T(x * scale);
      std::vector<T> first;
      for (int w = 0; w < Kernels<T>::kWidths; ++w) {
        compiled.force_width(w);
        std::vector<T> f(size_t(batch) * rows);
        compiled.evaluate(0, all.x.data(), nullptr, batch, 2, f.data(), nullptr);
        if (first.empty()) first = f;
        check(same(first, f), name + " instruction " + std::to_string(op) + ": bits by width");
      }
      bool ok = true;
      for (int s = 0; s < batch; ++s)
        for (int row = 0; row < rows; ++row) {
          auto in = [&](int i) { return double(all.x[s * p.dim + run.inputs[i].rows.row + (run.inputs[i].broadcast ? 0 : row)]); };
          const double number = T(p.vectors[0].values[run.vectors[0].first + (run.vectors[0].broadcast ? 0 : row)]);
          double wanted = instruct(one, in(0), in(1), in(2), number);
          const T found = first[size_t(s) * rows + row];
          if (static_cast<Instruct>(op) == Instruct::kPowNumber && one.number == 0.5 && in(0) == 0) wanted = 0;
          if (std::isnan(wanted)) ok = ok && std::isnan(found);
          else if (std::isinf(T(wanted))) ok = ok && found == T(wanted);
          else ok = ok && std::fabs(double(found) - wanted) <= 8 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52) * (std::fabs(wanted) + (kind.reads > 1 ? std::fabs(in(0) * in(1)) + std::fabs(in(2)) : 0) + 1e-30);
        }
      check(ok, name + " instruction " + std::to_string(op) + ": values");
    }
  }
}

// A product that is cut into blocks of columns, into rows of a buffer whose other rows are somebody else's.
template <class T>
void test_neighbours(Random& random, const KernelSet& set, const std::string& name) {
  for (double density : {0.3, 1.0}) {
    const int wide = 400, rows = 5, above = 3, below = 6, all_rows = above + rows + below;
    Program<double> p;
    p.dim = wide, p.out = all_rows;
    p.input = add_buffer(p, wide, 1), p.output = add_buffer(p, all_rows, 1);
    Expression copy;
    copy.inputs = copy.outputs = 1;
    copy.code.push_back({Instruct::kCopy, 1, 0, 0, 0, 0});
    p.expressions.push_back(copy);
    Op op;
    op.kind = OpKind::kPointwise;
    op.expression = 0, op.rows = all_rows, op.inputs = {{{p.input, 0}, false}}, op.outputs = {{p.output, 0}};
    p.body = {op, product_op(add(p, random_matrix(random, rows, wide, density)), {p.input, 0}, {p.output, 0, above})};
    CompiledProgram<T> compiled(convert<T>(p), table_of<T>(set));
    const int batch = 40;
    const Case<T> all(random, batch, wide);
    for (int w = 0; w < Kernels<T>::kWidths; ++w) {
      compiled.force_width(w);
      std::vector<T> f(batch * all_rows);
      compiled.evaluate(0, all.x.data(), nullptr, batch, 1, f.data(), nullptr);
      bool untouched = true;
      for (int s = 0; s < batch; ++s)
        for (int row = 0; row < all_rows; ++row)
          if (row < above || row >= above + rows) untouched = untouched && f[s * all_rows + row] == all.x[s * wide + row];
      check(untouched, name + ": a product leaves its neighbours alone");
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- forwards

template <class T>
void test_forwards(Random& random, const Program<double>& p, const KernelSet& set, const std::string& name) {
  CompiledProgram<T> compiled(convert<T>(p), table_of<T>(set));
  const TimeAnswer time(random, p.time_rows);
  give_time<T>(compiled, p, time, set);
  const int dim = p.dim, out = p.out_rows(), given = p.context_rows(), widths = Kernels<T>::kWidths;
  const int batch = compiled.width(widths - 1) + 3;
  const GraphCase<T> all(random, batch, p);
  const double t = 0.375;
  std::vector<T> f, trace;
  for (int w = -1; w < widths; ++w)
    for (int threads : {1, 3}) {
      compiled.force_width(w);
      std::vector<T> again(batch * out), again_trace(batch);
      compiled.evaluate(t, all.x.data(), nullptr, batch, threads, again.data(), again_trace.data(), all.context.data());
      if (f.empty()) f = again, trace = again_trace;
      check(same(f, again) && same(trace, again_trace), name + ": bits by width and threads");
    }
  GraphInterpreter interpreter(p, time.at(T(t)));
  bool ok = true;
  for (int s = 0; s < batch; s += 5) {
    interpreter.begin(widened(&all.x[s * dim], dim).data(), widened(all.context.data() + s * given, given).data());
    interpreter.run(p.body);
    for (int c = 0; c < out; ++c) ok = ok && close(f[s * out + c], interpreter.memory[0][p.output][c], 1);
    ok = ok && close(trace[s], interpreter.trace, 100);
  }
  check(ok, name + ": evaluation against the interpreter");
  SolveInput<T> in = all.input(euler(), 2);
  in.context = all.context.data();
  in.sign = -1;
  std::vector<T> xs(3 * batch * dim), ls(3 * batch);
  if (out != dim) return check(thrown([&] { compiled.solve(in, xs.data(), ls.data()); }).find("as many outputs") != std::string::npos, name + ": no solve");
  compiled.solve(in, xs.data(), ls.data());
  ok = true;
  for (int s = 0; s < batch; s += 7) {
    std::vector<double> y = widened(&all.x[s * dim], dim);
    double l = all.l[s];
    for (size_t i = 0; i + 1 < in.grid.size(); ++i) {
      const double step = in.grid[i + 1] - in.grid[i];
      GraphInterpreter at(p, time.at(-in.grid[i]));
      at.begin(y.data(), widened(all.context.data() + s * given, given).data());
      at.run(p.body);
      for (int c = 0; c < dim; ++c) y[c] -= step * at.memory[0][p.output][c];
      l += step * at.trace;
    }
    for (int c = 0; c < dim; ++c) ok = ok && close(xs[(2 * batch + s) * dim + c], y[c], 10);
    if (p.divergence) ok = ok && close(ls[2 * batch + s], l, 1000);
  }
  check(ok, name + ": Euler's method");
  for (const Tableau& tableau : {euler(), bosh3()}) {
    std::vector<T> wanted;
    for (int w = 0; w < widths; ++w)
      for (bool per_tile : {false, true}) {
        if (per_tile && tableau.adaptive) continue;  // steps of their own
        in = all.input(tableau, 1 + w % 3);
        in.context = all.context.data(), in.per_tile = per_tile;
        compiled.force_width(w);
        const SolveOutput<T> solved = compiled.solve(in, xs.data(), ls.data());
        if (solved.status != "ok") continue;
        if (wanted.empty()) wanted = xs;
        check(same(xs, wanted), name + ": bits of a solve");
      }
  }
  in.context = nullptr;
  if (p.context >= 0) check(thrown([&] { compiled.solve(in, xs.data(), ls.data()); }).find("needs a context") != std::string::npos, name + ": no context");
}

// ------------------------------------------------------------------------------------------------------------ backwards

template <class T>
void test_backwards(Random& random, const Program<double>& p, const KernelSet& set, const std::string& name) {
  CompiledAdjoint<T> adjoint(convert<T>(p), table_of<T>(set));
  const TimeAnswer time(random, p.time_rows);
  give_time<T>(adjoint, p, time, set);
  const int dim = p.dim, out = p.out_rows(), given = p.context_rows(), batch = pick(random, 1, 100);
  const GraphCase<T> all(random, batch, p);
  const std::vector<T> grad = random_states<T>(random, 3 * batch * out);
  const double t = 0.25;
  GraphInterpreter interpreter(p, time.at(T(t)));
  std::vector<double> wanted_x, wanted_context;
  for (int s = 0; s < batch; ++s) {
    interpreter.begin(widened(&all.x[s * dim], dim).data(), widened(all.context.data() + s * given, given).data());
    interpreter.run(p.keep);
    for (int c = 0; c < out; ++c) interpreter.memory[0][p.cotangent][c] = grad[s * out + c];
    interpreter.run(p.reverse);
    for (int c = 0; c < dim; ++c) wanted_x.push_back(interpreter.memory[0][p.state_cotangent][c]);
    for (int c = 0; c < given; ++c) wanted_context.push_back(interpreter.memory[0][p.context_cotangent][c]);
  }
  for (int w = -1; w < Kernels<T>::kWidths; ++w) {
    if (w >= 0 && table_of<T>(set).pull[0][0][w] == nullptr) continue;
    adjoint.force_width(w);
    std::vector<T> grad_x(batch * dim), grad_context(batch * given);
    const auto found = adjoint.evaluate(t, all.x.data(), nullptr, batch, 2, grad.data(), nullptr, grad_x.data(), all.context.data(), grad_context.data());
    bool ok = true;
    for (size_t i = 0; i < wanted_x.size(); ++i) ok = ok && close(grad_x[i], wanted_x[i], 10);
    check(ok, name + ": the cotangent of the state");
    ok = true;
    for (size_t i = 0; i < wanted_context.size(); ++i) ok = ok && close(grad_context[i], wanted_context[i], 10);
    check(ok, name + ": the cotangent of the context");
    auto agree = [&](const std::vector<double>& values, int sum) {
      bool agrees = values.size() == size_t(sum < 0 ? 0 : p.sums[sum].size);
      for (size_t i = 0; i < values.size() && agrees; ++i) agrees = close(T(values[i]), interpreter.sums[sum][i], 10 * batch);
      return agrees;
    };
    for (size_t i = 0; i < p.matrices.size(); ++i) check(agree(found.matrices[i], p.matrices[i].sum), name + ": the gradient of a matrix");
    std::vector<double> of_time(p.time_rows, 0.0);
    bool any = false;
    for (size_t i = 0; i < p.vectors.size(); ++i) {
      const auto& v = p.vectors[i];
      if (!v.timed()) check(agree(found.vectors[i], v.sum), name + ": the gradient of a row vector");
      if (!v.timed() || v.sum < 0) continue;
      any = true;
      for (int j = 0; j < v.n; ++j) of_time[v.time_row + j] += interpreter.sums[v.sum][j];
    }
    ok = found.time_points.size() == size_t(any) && found.time_cotangents.size() == size_t(any * p.time_rows) && (!any || found.time_points[0] == T(t));
    for (int i = 0; ok && any && i < p.time_rows; ++i) ok = close(T(found.time_cotangents[i]), of_time[i], 50 * batch);
    check(ok, name + ": the cotangent of the time answer");
  }
  adjoint.force_width(-1);
  SolveRecord<T> record;
  record.batch = batch, record.times = {0.0, 0.5, 1.0}, record.steps = {{0.0, 0.25}, {0.25, 0.75}};
  record.context = all.context.data();
  const std::vector<T> states = random_states<T>(random, 3 * batch * dim), derivatives = random_states<T>(random, 3 * batch * dim);
  record.states = states.data(), record.derivatives = derivatives.data();
  for (const Tableau& tableau : {bosh3(), euler()}) {
    record.tableau = tableau, record.kept = tableau.adaptive;
    std::vector<T> x, context;
    std::vector<double> cotangents;
    for (int threads : {1, 3}) {
      std::vector<T> grad_x(batch * dim), grad_context(batch * given), grad_l(batch);
      auto solve = [&] { return adjoint.solve(record, threads, grad.data(), nullptr, grad_x.data(), grad_l.data(), grad_context.data()); };
      if (out != dim) {
        check(thrown(solve).find("as many outputs") != std::string::npos, name + ": no solve");
        continue;
      }
      const auto found = solve();
      if (threads == 1) x = grad_x, context = grad_context, cotangents = found.time_cotangents;
      check(same(grad_x, x) && same(grad_context, context) && same(found.time_cotangents, cotangents), name + ": bits by threads");
    }
  }
}

}  // namespace

int main() {
  force_threads(true);
  const KernelSet* sets;
  const int n = available_sets(&sets);
  for (int i = 0; i < n; ++i) {
    Random random(40 + i);
    const std::string set(sets[i].name);
    test_instructions<float>(random, sets[i], set + " float32");
    test_instructions<double>(random, sets[i], set + " float64");
    test_neighbours<float>(random, sets[i], set + " float32");
    test_neighbours<double>(random, sets[i], set + " float64");
    for (int trial = 0; trial < 60; ++trial) {
      const bool adjoint = trial % 2;
      const Program<double> p = graph_program(random, adjoint);
      const std::string name = set + (adjoint ? " adjoint graph " : " graph ") + std::to_string(trial);
      (adjoint ? test_backwards<float> : test_forwards<float>)(random, p, sets[i], name + " float32");
      (adjoint ? test_backwards<double> : test_forwards<double>)(random, p, sets[i], name + " float64");
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
