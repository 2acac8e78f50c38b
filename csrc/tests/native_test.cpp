// The CPU engine without Python, meant to run under the address and undefined-behaviour sanitizers (`make sanitize`):
// random programs against a plain interpreter in double, every instruction set, tile width and thread count. Programs that
// are wrong: fuzz_test.cpp.
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>

#include "cpu/thread_pool.h"
#include "native_case.h"

using namespace sparseflow;
using namespace sparseflow::testing;

namespace {

// ---------------------------------------------------------------------------------------------- the plain interpreter

void activation(Activation kind, ActivationParams params, double z, double& h, double& slope) {
  const double s = 1 / (1 + std::exp(-z));
  switch (kind) {
    case Activation::kIdentity: h = z, slope = 1; break;
    case Activation::kTanh: h = std::tanh(z), slope = 1 - h * h; break;
    case Activation::kSigmoid: h = s, slope = s * (1 - s); break;
    case Activation::kSoftplus: {
      const double x = params.a * z;
      h = x > params.b ? z : std::log1p(std::exp(x)) / params.a;
      slope = x > params.b ? 1 : 1 / (1 + std::exp(-x));
      break;
    }
    case Activation::kRelu: h = z > 0 ? z : 0, slope = z > 0; break;
    case Activation::kElu: h = z > 0 ? z : params.a * std::expm1(z), slope = z > 0 ? 1 : params.a * std::exp(z); break;
    case Activation::kSilu: h = z * s, slope = s + h * (1 - s); break;
    case Activation::kSin: h = std::sin(z), slope = std::cos(z); break;
    case Activation::kSquare: h = z * z, slope = 2 * z; break;
    case Activation::kCube: h = z * z * z, slope = 3 * z * z; break;
    case Activation::kGelu: {
      const double below = 0.5 * std::erfc(-std::sqrt(0.5) * z);
      h = z * below, slope = below + z * std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
      break;
    }
  }
}

// One sample, loop by loop as csrc/field.h and kernels.h word it.
struct Interpreter {
  const Program<double>& p;
  std::vector<std::vector<double>> answers;
  std::vector<std::vector<double>> scale, shift, values;
  double largest = 1;  // magnitude met on the way, what rounding errors are measured by

  Interpreter(const Program<double>& program, double t) : p(program) {
    if (p.externals > 0) answers = externals_of(p)({t})[0];
    for (const auto& m : p.modulations) {
      scale.emplace_back(m.n, 1.0);
      shift.emplace_back(m.n, 0.0);
      for (int i = 0; i < m.n; ++i) {
        double c = 0;
        if (m.external_gate >= 0) scale.back()[i] = answers[m.external_gate][i];
        else if (!m.gate_slope.empty()) scale.back()[i] = 1 / (1 + std::exp(-(m.gate_slope[i] * t + m.gate_offset[i])));
        if (m.external_shift >= 0) c = answers[m.external_shift][i];
        else if (!m.shift_slope.empty()) c = m.shift_slope[i] * t + m.shift_offset[i];
        shift.back()[i] = scale.back()[i] * m.bias[i] + c;
      }
    }
    for (const auto& m : p.matrices) {
      values.push_back(m.values);
      if (m.gated) {
        values.back().assign(m.nnz(), 0.0);
        for (size_t k = 0; k < m.path_entry.size(); ++k)
          values.back()[m.path_entry[k]] += m.path_constant[k] * scale[m.gate_modulation][m.path_gate[k]];
      } else if (m.external >= 0) {
        values.back() = answers[m.external];
      }
    }
  }

  void run(const double* x, const double* noise, double* f, double& trace) {
    std::vector<std::vector<double>> memory[2];
    for (const Buffer& b : p.buffers)
      for (auto& slot : memory) slot.emplace_back(b.rows, 0.0);
    auto at = [&](Operand o) -> std::vector<double>& { return memory[o.slot][o.buffer]; };
    std::copy_n(x, p.dim, memory[0][p.input].begin());
    if (p.noise >= 0) std::copy_n(noise, p.dim, memory[0][p.noise].begin());
    if (p.ones >= 0) memory[0][p.ones][0] = 1;
    trace = 0;
    std::vector<Op> ops(p.prologue);
    ops.insert(ops.end(), p.body.begin(), p.body.end());
    for (const Op& op : ops) {
      const Matrix<double>& m = p.matrices[op.matrix];
      for (int i = 0; i < m.rows; ++i) {
        double sum = 0, tangent = 0;
        for (int k = m.row_ptr[i]; k < m.row_ptr[i + 1]; ++k) {
          sum += values[op.matrix][k] * at(op.source)[m.col[k]];
          if (op.tangent()) tangent += values[op.matrix][k] * memory[1][op.source.buffer][m.col[k]];
        }
        double term = sum;
        if (op.kind == OpKind::kAffine) {
          const double s = scale[op.modulation][i];
          double h = 0, slope = 0;
          activation(op.activation, op.params, s * sum + shift[op.modulation][i], h, slope);
          memory[0][op.target.buffer][i] = h;
          largest = std::max({largest, std::fabs(h), std::fabs(slope)});
          slope *= s;
          term = op.tangent() ? slope * tangent : op.store >= 2 ? slope * at(op.seed)[i] : slope;
          if (op.store == 1 || op.store == 2 || op.store == 4) memory[1][op.target.buffer][i] = term;
          if (op.store == 3 || op.store == 5) trace += term *= at(op.weight)[i];
        } else {
          if (op.factor.buffer >= 0) term *= at(op.factor)[op.factor_row.empty() ? i : op.factor_row[i]];
          if (op.factor2.buffer >= 0) term *= at(op.factor2)[op.factor2_row.empty() ? i : op.factor2_row[i]];
          if (op.coefficient_matrix >= 0) term *= values[op.coefficient_matrix][i];
          if (op.kind == OpKind::kProduct) at(op.target)[i] = term;
          else trace += term;
        }
        largest = std::max(largest, std::fabs(term));
      }
    }
    for (int c = 0; c < p.dim; ++c) f[c] = memory[0][p.output][c];
  }
};

// ------------------------------------------------------------------------------------------------------------- tests

template <class T>
void test_program(Random& random, const Program<double>& meaning, const KernelSet& set, const std::string& name) {
  CompiledProgram<T> compiled(convert<T>(meaning), table_of<T>(set));
  compiled.set_refresh(externals_of(compiled.program()));
  const int dim = meaning.dim, widths = Kernels<T>::kWidths;
  const double t = 0.375, epsilon = sizeof(T) == 4 ? 2e-5 : 1e-12;
  const int batch = compiled.width(widths - 1) + 3;
  const Case<T> all(random, batch, dim);
  std::vector<T> f(batch * dim), trace(batch);
  compiled.force_width(0);
  compiled.evaluate(t, all.x.data(), all.noise.data(), batch, 1, f.data(), trace.data());
  for (int s = 0; s < batch; s += 7) {
    const std::vector<double> x(all.x.begin() + s * dim, all.x.begin() + (s + 1) * dim),
        noise(all.noise.begin() + s * dim, all.noise.begin() + (s + 1) * dim);
    std::vector<double> wanted(dim);
    double wanted_trace;
    Interpreter interpreter(meaning, t);
    interpreter.run(x.data(), noise.data(), wanted.data(), wanted_trace);
    const double bound = epsilon * interpreter.largest * interpreter.largest;
    bool ok = !meaning.divergence || std::fabs(trace[s] - wanted_trace) <= bound * 10;
    for (int c = 0; c < dim; ++c) ok = ok && std::fabs(f[s * dim + c] - wanted[c]) <= bound;
    check(ok, name + ": evaluation against the interpreter");
  }
  for (int w = -1; w < widths; ++w) {
    compiled.force_width(w);
    for (int threads = 1; threads <= 4; ++threads) {
      std::vector<T> again(batch * dim), again_trace(batch);
      compiled.evaluate(t, all.x.data(), all.noise.data(), batch, threads, again.data(), again_trace.data());
      check(same(f, again) && (!meaning.divergence || same(trace, again_trace)), name + ": bits by width and threads");
    }
    for (int part : {1, compiled.width(std::max(w, 0)) - 1, compiled.width(std::max(w, 0)) + 1}) {
      if (part < 1) continue;
      // copies of the exact size: reading beyond the batch is an error
      const std::vector<T> x(all.x.begin(), all.x.begin() + part * dim);
      const std::vector<T> noise(all.noise.begin(), all.noise.begin() + part * dim);
      std::vector<T> again(part * dim);
      compiled.evaluate(t, x.data(), noise.data(), part, 2, again.data(), nullptr);
      check(std::memcmp(again.data(), f.data(), again.size() * sizeof(T)) == 0, name + ": bits by batch");
    }
  }

  for (const Tableau& tableau : {bosh3(), euler()}) {
    std::vector<T> xs, ls;
    SolveOutput<T> wanted;
    for (int w = 0; w < widths; ++w) {
      for (int threads : {1, 3}) {
        SolveInput<T> in = all.input(tableau, threads);
        in.sign = -1;
        std::vector<T> xs2(in.times.size() * batch * dim), ls2(in.times.size() * batch);
        compiled.force_width(w);
        const SolveOutput<T> out = compiled.solve(in, xs2.data(), ls2.data());
        if (xs.empty()) {
          xs = xs2, ls = ls2, wanted = out;
          if (!tableau.adaptive) {
            double worst = 0, largest = 1;
            for (int s = 0; s < batch; s += 11) {  // Euler's method, written out
              std::vector<double> y(all.x.begin() + s * dim, all.x.begin() + (s + 1) * dim), g(dim),
                  noise(all.noise.begin() + s * dim, all.noise.begin() + (s + 1) * dim);
              double l = all.l[s], divergence = 0;
              for (size_t i = 0; i + 1 < in.grid.size(); ++i) {
                Interpreter interpreter(meaning, -in.grid[i]);
                interpreter.run(y.data(), noise.data(), g.data(), divergence);
                for (int c = 0; c < dim; ++c) y[c] -= (in.grid[i + 1] - in.grid[i]) * g[c];
                l += (in.grid[i + 1] - in.grid[i]) * divergence;
                largest = std::max(largest, interpreter.largest * interpreter.largest);
              }
              const size_t end = (in.times.size() - 1) * batch + s;
              for (int c = 0; c < dim; ++c) worst = std::max(worst, std::fabs(xs[end * dim + c] - y[c]));
              if (meaning.divergence) worst = std::max(worst, std::fabs(ls[end] - l) / 10);
            }
            check(worst <= 10 * epsilon * largest * largest, name + ": Euler's method");
          }
          continue;
        }
        const bool ok = out.status == wanted.status && out.nfe == wanted.nfe && out.steps == wanted.steps;
        const bool bits = same(xs, xs2) && (!meaning.divergence || same(ls, ls2));
        check(ok && (bits || out.status != "ok"), name + ": bits of a solve");
      }
    }
    SolveInput<T> in = all.input(tableau, 2);
    in.per_tile = true;
    const SolveOutput<T> out = compiled.solve(in, xs.data(), ls.data());
    check(out.nfe > 0, name + ": per tile");
    in.batch = 0;
    in.x = in.l = in.noise = nullptr;
    check(compiled.solve(in, nullptr, nullptr).nfe == 0, name + ": empty batch");
    compiled.evaluate(t, nullptr, nullptr, 0, 2, nullptr, nullptr);
  }
}

// ---------------------------------------------------------------------------------------------------------- adjoints

template <class T>
void test_adjoint(Random& random, const Program<double>& meaning, const KernelSet& set, const std::string& name) {
  const Program<T> program = convert<T>(meaning);
  Program<T> plain = program;  // the same field, to be solved
  plain.keep.clear(), plain.reverse.clear(), plain.sums.clear();
  plain.cotangent = plain.noise = -1, plain.divergence = false;
  plain.buffers[plain.input].slots = 1;
  const int batch = pick(random, 1, 150), dim = program.dim;
  const Case<T> all(random, batch, dim);
  const std::vector<T> grad = random_states<T>(random, 3 * batch * dim), grad_trace(batch, T(0)), grad_l = random_states<T>(random, 3 * batch);
  CompiledAdjoint<T> adjoint(program, table_of<T>(set));
  std::vector<T> grad_x(batch * dim);
  const auto gradient = adjoint.evaluate(0.25, all.x.data(), all.noise.data(), batch, 1, grad.data(), grad_trace.data(), grad_x.data());
  if (sizeof(T) == 8) {  // against central differences of a sum over the batch
    CompiledProgram<T> field(plain, table_of<T>(set));
    const double h = 1e-5;
    double worst = 0;
    for (int c = 0; c < dim; ++c) {
      std::vector<T> f[2];
      for (int side : {0, 1}) {
        std::vector<T> x(all.x);
        for (int s = 0; s < batch; ++s) x[s * dim + c] += T(side ? h : -h);
        f[side].resize(x.size());
        field.evaluate(0.25, x.data(), x.data(), batch, 1, f[side].data(), nullptr);
      }
      for (int s = 0; s < batch; ++s) {
        double difference = 0;
        for (int i = 0; i < dim; ++i) difference += double(grad[s * dim + i]) * double(f[1][s * dim + i] - f[0][s * dim + i]) / (2 * h);
        worst = std::max(worst, std::fabs(difference - double(grad_x[s * dim + c])));
      }
    }
    check(worst < 1e-7, name + ": the cotangent of the state");
  }

  for (const Tableau& tableau : {bosh3(), euler()}) {
    CompiledProgram<T> field(plain, table_of<T>(set));
    SolveInput<T> in = all.input(tableau, 1);
    in.record = true;
    in.record_stages = chance(random, 0.5);
    std::vector<T> xs(in.times.size() * batch * dim), ls;
    const SolveOutput<T> out = field.solve(in, xs.data(), nullptr);
    if (out.status != "ok") continue;
    SolveRecord<T> record;
    record.batch = batch, record.tableau = tableau, record.noise = all.noise.data(), record.times = in.times;
    record.steps = out.steps, record.states = out.states.data(), record.derivatives = out.derivatives.data();
    record.kept = static_cast<int>(out.derivatives.size() / out.states.size());
    check(record.kept == (in.record_stages ? (tableau.adaptive ? 2 : 0) : tableau.adaptive), name + ": derivatives kept");
    std::vector<T> wanted;
    std::vector<double> wanted_values;
    for (int threads : {1, 3}) {
      std::vector<T> x(batch * dim), l(batch);
      const auto found = adjoint.solve(record, threads, grad.data(), grad_l.data(), x.data(), l.data());
      check(found.matrices.size() == program.matrices.size() && found.modulations.size() == program.modulations.size(), name + ": sizes");
      if (threads == 1) wanted = x, wanted_values = found.matrices[0];
      check(same(x, wanted) && same(found.matrices[0], wanted_values), name + ": bits by threads");
    }
  }
}

// Work without an end is ended by what `ask` throws, whoever is at it; and what is in use by a call is not used within it.
void test_calls() {
  Cost cost;
  for (int threads : {1, 3}) {
    for (bool helpers_only : {false, true}) {
      std::atomic<bool> helped{false};
      Interruption interruption([] { throw std::runtime_error("that is enough"); });
      const std::string message = thrown([&] {
        interruption.during([&] {
          parallel_for(threads, threads, Work{cost, 1}, [&](int, int worker) {
            if (worker > 0) helped = true;
            if (helpers_only && worker == 0 && threads > 1) {  // the caller is done, and waits for them, if they have come
              for (int i = 0; i < 2000 && !helped; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
              if (helped) return;
            }
            for (;;) worked(1000);
          });
        });
      });
      check(message == "that is enough", "an interruption arrives, not: " + message);
      check(thrown([] { worked(int64_t(1) << 40); }).empty(), "and is over");
    }
  }
  Exclusive one, other;
  const std::string message = thrown([&] {
    const Exclusive::Hold held(one), also(other);
    parallel_for(4, 3, Work{cost, 1}, [&](int, int) { const Exclusive::Hold again(one); });
  });
  check(message.find("may not run the same") != std::string::npos, "a call within a call is refused, not: " + message);
  int sum = 0;
  auto add = [&] {
    for (int i = 0; i < 1000; ++i) {
      const Exclusive::Hold held(one);
      ++sum;
    }
  };
  std::thread thread(add);
  add();
  thread.join();
  check(sum == 2000, "one call at a time");
  Interruption impatient([] { throw std::runtime_error("cannot wait"); });
  std::thread owner;
  {
    std::atomic<bool> ready{false}, done{false};
    owner = std::thread([&] {
      const Exclusive::Hold held(one);
      ready = true;
      while (!done) std::this_thread::yield();
    });
    while (!ready) std::this_thread::yield();
    check(thrown([&] { impatient.during([&] { const Exclusive::Hold held(one); }); }) == "cannot wait", "waiting can be interrupted");
    done = true;
    owner.join();
  }
}

void test_refresh(Random& random, const KernelSet& set) {
  Program<double> p;
  while (p.externals == 0) p = random_program(random, 1);
  CompiledProgram<double> compiled(p, *set.f64);
  compiled.force_width(0);
  const Case<double> all(random, 3, p.dim);
  std::vector<double> f(3 * p.dim), trace(3);
  using Answers = std::vector<std::vector<std::vector<double>>>;
  const std::function<Answers(size_t)> wrong[] = {
      [](size_t) { return Answers(); },
      [](size_t n) { return Answers(n); },
      [&](size_t n) { return Answers(n, std::vector<std::vector<double>>(p.externals, std::vector<double>(100000))); },
  };
  for (const auto& answer : wrong) {
    compiled.set_refresh([&](const std::vector<double>& times) { return answer(times.size()); });
    const std::string message =
        thrown([&] { compiled.evaluate(0, all.x.data(), all.noise.data(), 3, 1, f.data(), trace.data()); });
    check(message.rfind("refresh: ", 0) == 0, "wrong answers are refused, not: " + message);
  }
}

void test_errors_of_a_solve(Random& random, const KernelSet& set) {
  const Program<double> p = random_program(random, 0);
  CompiledProgram<double> compiled(p, *set.f64);
  compiled.set_refresh(externals_of(p));
  Case<double> all(random, 70, p.dim);
  all.x[42 * p.dim] = std::nan("");
  std::vector<double> xs(3 * 70 * p.dim), ls(3 * 70);
  for (bool per_tile : {false, true}) {
    SolveInput<double> in = all.input(bosh3(), 2);
    in.per_tile = per_tile;
    const SolveOutput<double> out = compiled.solve(in, xs.data(), ls.data());
    check(out.status != "ok" && out.rows == std::vector<int>{42}, "a row that is not a number is named");
  }
  SolveInput<double> in = all.input(bosh3(), 2);
  in.options.max_num_steps = 0;
  check(compiled.solve(in, xs.data(), ls.data()).status == "max_num_steps", "too many steps");
  in.tableau.c.resize(16, 1.0);
  check(!thrown([&] { compiled.solve(in, xs.data(), ls.data()); }).empty(), "too many stages");
}

}  // namespace

int main() {
  force_threads(true);
  test_calls();
  const KernelSet* sets;
  const int n = available_sets(&sets);
  for (int i = 0; i < n; ++i) {
    Random random(20 + i);
    for (int trial = 0; trial < 24; ++trial) {
      const Program<double> p = random_program(random, trial % 3);
      const std::string name = std::string(sets[i].name) + " program " + std::to_string(trial);
      test_program<float>(random, p, sets[i], name + " float32");
      test_program<double>(random, p, sets[i], name + " float64");
    }
    for (int kind : {0, 1, 2}) {
      const Program<double> p = wide_program(random, kind);
      test_program<float>(random, p, sets[i], std::string(sets[i].name) + " wide float32");
      test_program<double>(random, p, sets[i], std::string(sets[i].name) + " wide float64");
    }
    for (int trial = 0; trial < 40; ++trial) {
      const Program<double> p = adjoint_program(random, trial % 2);
      const std::string name = std::string(sets[i].name) + " adjoint " + std::to_string(trial);
      test_adjoint<float>(random, p, sets[i], name + " float32");
      test_adjoint<double>(random, p, sets[i], name + " float64");
    }
    test_refresh(random, sets[i]);
    test_errors_of_a_solve(random, sets[i]);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
