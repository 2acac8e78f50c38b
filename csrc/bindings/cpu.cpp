// Python's view of the CPU engine: a program builder, and what it compiles to. Arrays of a program come as numpy arrays
// and are checked and copied once; batches come as addresses of contiguous memory that the caller has checked.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <random>

#include "../cpu/adjoint.h"
#include "../cpu/cores.h"
#include "../cpu/processor.h"
#include "../cpu/solve.h"
#include "builder.h"

namespace py = pybind11;
using namespace sparseflow;

namespace {

template <class T>
const Kernels<T>& kernel_table() {
  if constexpr (sizeof(T) == 4) return *kernels().f32;
  else return *kernels().f64;
}

// The callback may run, and the last copy of it may die, on a thread that does not hold the interpreter.
template <class T>
RefreshCallback<T> callback_of(py::function function) {
  auto held = std::shared_ptr<py::function>(new py::function(std::move(function)), [](py::function* f) {
    py::gil_scoped_acquire gil;
    delete f;
  });
  return [held](const std::vector<double>& times) {
    py::gil_scoped_acquire gil;
    std::vector<std::vector<std::vector<T>>> answers;
    for (py::handle one : (*held)(times)) {
      answers.emplace_back();
      for (py::handle part : one) answers.back().push_back(copy(py::cast<Array<T>>(part)));
    }
    return answers;
  };
}

// An array that takes over the memory of a vector.
template <class Vector, class V = typename Vector::value_type>
py::array_t<V> array_of(Vector&& values) {
  auto* held = new Vector(std::move(values));
  return py::array_t<V>(py::ssize_t(held->size()), held->data(), py::capsule(held, [](void* p) { delete static_cast<Vector*>(p); }));
}

template <class T>
py::dict gradient_dict(ProgramGradient<T>&& gradient) {
  py::dict out;
  py::list matrices, modulations, vectors;
  for (auto& values : gradient.matrices) matrices.append(array_of(std::move(values)));
  for (auto& m : gradient.modulations) {
    py::dict one;
    one["bias"] = array_of(std::move(m.bias));
    one["gate.slope"] = array_of(std::move(m.gate_slope));
    one["gate.offset"] = array_of(std::move(m.gate_offset));
    one["shift.slope"] = array_of(std::move(m.shift_slope));
    one["shift.offset"] = array_of(std::move(m.shift_offset));
    modulations.append(one);
  }
  out["matrices"] = matrices;
  out["modulations"] = modulations;
  for (auto& values : gradient.vectors) vectors.append(array_of(std::move(values)));
  out["vectors"] = vectors;
  out["t"] = gradient.t;
  const py::ssize_t times = py::ssize_t(gradient.time_points.size());
  const py::ssize_t rows = times > 0 ? py::ssize_t(gradient.time_cotangents.size()) / times : 0;
  out["time_points"] = array_of(std::move(gradient.time_points));
  out["time_cotangents"] = array_of(std::move(gradient.time_cotangents)).reshape({times, rows});
  return out;
}

template <class T>
py::dict adjoint_evaluate(CompiledAdjoint<T>& self, double t, uintptr_t x, uintptr_t noise, const py::object& batch, const py::object& threads,
                          uintptr_t grad_f, uintptr_t grad_trace, uintptr_t grad_x, uintptr_t context, uintptr_t grad_context) {
  const int samples = batch_of(batch), workers = threads_of(threads);
  const bool any = samples > 0;
  if (any && self.program().noise >= 0 && noise == 0) throw std::invalid_argument("evaluate: this program needs noise");
  const T *from = address<T>(x, "x", any), *probe = address<T>(noise, "noise", false), *of_f = address<T>(grad_f, "grad_f", any);
  const T* of_trace = address<T>(grad_trace, "grad_trace", false);
  const T* const given = address<T>(context, "context", any && self.program().context_rows() > 0);
  T *const to = address<T>(grad_x, "grad_x", any), *const to_context = address<T>(grad_context, "grad_context", false);
  return gradient_dict(interruptible([&] { return self.evaluate(t, from, probe, samples, workers, of_f, of_trace, to, given, to_context); }));
}

template <class T>
py::dict adjoint_solve(CompiledAdjoint<T>& self, uintptr_t noise, const py::object& batch, std::vector<double> times, const py::object& sign,
                       const py::dict& tableau, bool perturb, const Array<double>& steps, const Array<T>& states, const Array<T>& derivatives,
                       const py::object& threads, uintptr_t grad_xs, uintptr_t grad_ls, uintptr_t grad_x, uintptr_t grad_l,
                       uintptr_t context, uintptr_t grad_context) {
  SolveRecord<T> record;
  const int samples = record.batch = batch_of(batch), workers = threads_of(threads);
  record.sign = sign_of(sign);
  record.tableau = tableau_of(tableau);
  record.perturb = perturb;
  record.noise = address<T>(noise, "noise", false);
  record.times = points_of(std::move(times), "times");
  record.states = states.data();
  record.derivatives = derivatives.data();
  if (steps.size() > 0 && (steps.ndim() != 2 || steps.shape(1) != 2)) throw std::invalid_argument("steps must be [steps, 2]");
  const py::ssize_t count = steps.size() / 2;
  for (py::ssize_t i = 0; i < count; ++i) record.steps.emplace_back(steps.data()[2 * i], steps.data()[2 * i + 1]);
  const py::ssize_t wanted = (count + 1) * samples * self.program().dim;
  record.kept = wanted > 0 ? static_cast<int>(derivatives.size() / wanted) : 0;
  if (states.size() != wanted || derivatives.size() != record.kept * wanted || record.kept < (record.tableau.adaptive ? 1 : 0) ||
      record.kept >= record.tableau.stages())
    throw std::invalid_argument("solve: the recorded states and derivatives do not fit the steps");
  if (self.program().noise >= 0 && noise == 0) throw std::invalid_argument("solve: this program needs noise");
  if (record.times.empty()) throw std::invalid_argument("solve: no output times");
  const bool any = samples > 0;
  record.context = address<T>(context, "context", any && self.program().context_rows() > 0);
  T* const to_context = address<T>(grad_context, "grad_context", false);
  const T *of_xs = address<T>(grad_xs, "grad_xs", any), *of_ls = address<T>(grad_ls, "grad_ls", false);
  T *const to = address<T>(grad_x, "grad_x", any), *const to_l = address<T>(grad_l, "grad_l", any && self.program().divergence);
  return gradient_dict(interruptible([&] { return self.solve(record, workers, of_xs, of_ls, to, to_l, to_context); }));
}

template <class T>
py::dict solve(CompiledProgram<T>& self, uintptr_t x, uintptr_t l, uintptr_t noise, const py::object& batch, std::vector<double> times,
               const py::object& sign, const py::dict& tableau, const std::vector<py::object>& rtol,
               const std::vector<py::object>& atol, const py::dict& options, std::vector<double> grid, bool perturb, bool per_tile,
               bool record, bool record_stages, const py::object& threads, uintptr_t xs, uintptr_t ls, std::vector<int> parts, uintptr_t context) {
  SolveInput<T> in;
  in.batch = batch_of(batch);
  const bool any = in.batch > 0;
  in.x = address<T>(x, "x", any);
  in.l = address<T>(l, "l", false);
  in.noise = address<T>(noise, "noise", false);
  in.context = address<T>(context, "context", any && self.program().context_rows() > 0);
  in.times = points_of(std::move(times), "times");
  in.sign = sign_of(sign);
  in.tableau = tableau_of(tableau);
  if (in.times.empty()) throw std::invalid_argument("solve: no output times");
  for (const py::object& tolerance : rtol) in.rtol.push_back(real(tolerance, "rtol", 0.0, std::numeric_limits<double>::infinity()));
  for (const py::object& tolerance : atol) in.atol.push_back(real(tolerance, "atol", 0.0, std::numeric_limits<double>::infinity()));
  in.parts = std::move(parts);
  in.options = options_of(options);
  if (any && self.program().noise >= 0 && noise == 0) throw std::invalid_argument("solve: this program needs noise");
  if (any && self.program().divergence && (l == 0 || ls == 0)) throw std::invalid_argument("solve: a divergence needs l");
  in.grid = points_of(std::move(grid), "grid");
  in.perturb = perturb;
  in.per_tile = per_tile;
  in.record = record;
  in.record_stages = record_stages;
  in.threads = threads_of(threads);
  T *const to = address<T>(xs, "xs", any), *const to_l = address<T>(ls, "ls", false);
  SolveOutput<T> out = interruptible([&] { return self.solve(in, to, to_l); });
  py::array_t<double> steps({py::ssize_t(out.steps.size()), py::ssize_t(2)});
  for (size_t i = 0; i < out.steps.size(); ++i) {
    steps.mutable_at(i, 0) = out.steps[i].first;
    steps.mutable_at(i, 1) = out.steps[i].second;
  }
  py::dict result;
  result["nfe"] = out.nfe;
  result["accepted"] = out.accepted;
  result["rejected"] = out.rejected;
  result["steps"] = steps;
  result["status"] = out.status;
  result["t"] = out.t;
  result["dt"] = out.dt;
  result["rows"] = out.rows;
  if (record) {
    result["states"] = array_of(std::move(out.states));
    result["derivatives"] = array_of(std::move(out.derivatives));
    result["x_slopes"] = array_of(std::move(out.x_slopes));
    result["l_slopes"] = array_of(std::move(out.l_slopes));
  }
  return result;
}

// What CompiledProgram and CompiledAdjoint have in common.
template <class T, class C, class... Holder>
void bind_common(py::class_<C, Holder...>& c) {
  using Numbers = std::pair<uintptr_t, py::ssize_t>;  // an address, and how many lie there
  c.def("renew", [](C& self, const std::vector<std::pair<int, Numbers>>& matrices, const std::vector<std::pair<int, Numbers>>& vectors,
                    const std::vector<std::pair<int, std::array<Numbers, 5>>>& modulations) {
      // Copied first, while nobody else can change them: a solve that holds the program may be waiting for the interpreter.
      std::vector<std::vector<T>> copies;
      auto copy = [&](const Numbers& n) {
        const T* const from = address<T>(n.first, "renew", n.second > 0);
        copies.emplace_back(from, from + n.second);
      };
      for (const auto& one : matrices) copy(one.second);
      for (const auto& one : vectors) copy(one.second);
      for (const auto& one : modulations)
        for (const Numbers& part : one.second) copy(part);
      interruptible([&] {
        auto next = [at = copies.begin()]() mutable { return std::move(*at++); };
        for (const auto& one : matrices) self.set_values(one.first, next());
        for (const auto& one : vectors) self.set_vector(one.first, next());
        for (const auto& one : modulations) {
          std::vector<T> parts[5];
          for (std::vector<T>& part : parts) part = next();
          self.set_modulation(one.first, std::move(parts[0]), std::move(parts[1]), std::move(parts[2]), std::move(parts[3]), std::move(parts[4]));
        }
      }); },
    py::arg("matrices"), py::arg("vectors"), py::arg("modulations"),
    "new numbers, each as (its number in the program, (address, count)): the values of matrices, or path constants of gated ones; constant row "
    "vectors; of modulations bias, gate_slope, gate_offset, shift_slope and shift_offset, (0, 0) for one that there is not");
  c.def("set_time", [](C& self, std::shared_ptr<CompiledProgram<T>> program) {
      interruptible([&] { self.set_time(std::move(program)); }); }, py::arg("program"), "the program that gives the time answer, from the times as its batch");
  c.def("set_refresh", [](C& self, py::function function) {
      RefreshCallback<T> callback = callback_of<T>(std::move(function));
      interruptible([&] { self.set_refresh(std::move(callback)); }); }, py::arg("function"),
        "function(times) -> for every time a sequence of arrays, one per external of the program");
  c.def("force_width", [](C& self, const py::object& index) {
      const int number = static_cast<int>(whole(index, "index", INT_MIN, INT_MAX));
      interruptible([&] { self.force_width(number); }); }, py::arg("index"), "use this width from now on; -1: choose it anew for every batch");
}

template <class T>
void bind(py::module_& m, const char* builder, const char* compiled, const char* adjoint) {
  bind_builder<T>(m, builder)
      .def("compile", [](const Builder<T>& b) { return interruptible([&] { return std::make_shared<CompiledProgram<T>>(b.program(), kernel_table<T>()); }); })
      .def("compile_adjoint", [](const Builder<T>& b) { return interruptible([&] { return std::make_unique<CompiledAdjoint<T>>(b.program(), kernel_table<T>()); }); });

  py::class_<CompiledAdjoint<T>> adjoint_class(m, adjoint, "A checked adjoint program: gradients of evaluations and solves.");
  bind_common<T>(adjoint_class);
  adjoint_class
      .def("evaluate", &adjoint_evaluate<T>, py::arg("t"), py::arg("x"), py::arg("noise"), py::arg("batch"), py::arg("threads"), py::arg("grad_f"),
           py::arg("grad_trace"), py::arg("grad_x"), py::arg("context") = 0, py::arg("grad_context") = 0)
      .def("solve", &adjoint_solve<T>, py::arg("noise"), py::arg("batch"), py::arg("times"), py::arg("sign"), py::arg("tableau"), py::arg("perturb"),
           py::arg("steps"), py::arg("states"), py::arg("derivatives"), py::arg("threads"), py::arg("grad_xs"), py::arg("grad_ls"), py::arg("grad_x"), py::arg("grad_l"), py::arg("context") = 0,
           py::arg("grad_context") = 0)
      .def("op_seconds", [](CompiledAdjoint<T>& self, const py::object& batch) {
             const int samples = batch_of(batch);
             return interruptible([&] { return self.op_seconds(samples); });
           }, py::arg("batch"), "measured seconds per tile of every operation: body, keep, reverse")
      .def("width", [](const CompiledAdjoint<T>& self, const py::object& batch) { return self.width(batch_of(batch)); }, py::arg("batch"), "samples per tile");

  py::class_<CompiledProgram<T>, std::shared_ptr<CompiledProgram<T>>> program_class(m, compiled, "A checked program; evaluates and solves over batches in memory.");
  bind_common<T>(program_class);
  program_class
      .def(
          "evaluate",
          [](CompiledProgram<T>& self, double t, uintptr_t x, uintptr_t noise, const py::object& batch, const py::object& threads, uintptr_t f, uintptr_t trace,
             uintptr_t context) {
            const int samples = batch_of(batch), workers = threads_of(threads);
            const bool any = samples > 0;
            if (any && trace != 0 && self.program().noise >= 0 && noise == 0) throw std::invalid_argument("evaluate: this program needs noise");
            const T *from = address<T>(x, "x", any), *probe = address<T>(noise, "noise", false);
            const T* const given = address<T>(context, "context", any && self.program().context_rows() > 0);
            T *const to = address<T>(f, "f", any), *const to_trace = address<T>(trace, "trace", false);
            interruptible([&] { self.evaluate(t, from, probe, samples, workers, to, to_trace, given); });
          },
          py::arg("t"), py::arg("x"), py::arg("noise"), py::arg("batch"), py::arg("threads"), py::arg("f"), py::arg("trace"), py::arg("context") = 0)
      .def("solve", &solve<T>, py::arg("x"), py::arg("l"), py::arg("noise"), py::arg("batch"), py::arg("times"), py::arg("sign"),
           py::arg("tableau"), py::arg("rtol"), py::arg("atol"), py::arg("options"), py::arg("grid"), py::arg("perturb"),
           py::arg("per_tile"), py::arg("record"), py::arg("record_stages"), py::arg("threads"), py::arg("xs"), py::arg("ls"), py::arg("parts") = std::vector<int>(), py::arg("context") = 0)
      .def("widths", [](CompiledProgram<T>& self) {
             std::vector<int> out;
             for (int i = 0; i < Kernels<T>::kWidths; ++i) out.push_back(self.width(i));
             return out;
           }, "the tile widths on offer, in samples")
      .def("tile_seconds", [](CompiledProgram<T>& self) { return interruptible([&] { return self.tile_seconds(); }); },
           "measured seconds of one evaluation of one tile, per width")
      .def("workspace_bytes", [](CompiledProgram<T>& self, const py::object& index) {
             const int number = static_cast<int>(whole(index, "width_index", INT_MIN, INT_MAX));
             return interruptible([&] { return self.workspace_bytes(number); });
           }, py::arg("width_index"));
}

template <class T>
std::pair<Array<T>, Array<T>> activation_with(const Kernels<T>& table, int id, double a, double b, const Array<T>& z) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (id < 0 || id >= kActivations) throw std::invalid_argument("activation: unknown id " + std::to_string(id));
  if (!(std::fabs(a) < kInfinity) || a == 0.0 || std::isnan(b)) throw std::invalid_argument("activation: a must be finite and not 0, and b a number");
  if (z.size() > INT_MAX) throw std::invalid_argument("activation: z is too long");
  Array<T> h(z.size()), slope(z.size());
  table.activation(id, T(a), T(b), z.data(), static_cast<int>(z.size()), h.mutable_data(), slope.mutable_data(), nullptr);
  return {h, slope};
}

const KernelSet& find_set(const std::string& isa) {
  if (isa.empty()) return kernels();
  const KernelSet* sets;
  const int n = available_sets(&sets);
  for (int i = 0; i < n; ++i)
    if (isa == sets[i].name) return sets[i];
  throw std::invalid_argument("no kernels for '" + isa + "' here");
}

double seconds_of(const std::function<void()>& work, int repeats) {
  using Clock = std::chrono::steady_clock;
  double best = 1e300;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = Clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

Matrix<float> random_matrix(int rows, int cols, double density, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  Matrix<float> m;
  m.rows = rows;
  m.cols = cols;
  m.row_ptr.push_back(0);
  for (int i = 0; i < rows; ++i) {
    worked(16 * int64_t(cols));
    for (int j = 0; j < cols; ++j)
      if (uniform(random) < density) m.col.push_back(j), m.values.push_back(uniform(random) - 0.5f);
    m.row_ptr.push_back(static_cast<int32_t>(m.col.size()));
  }
  return m;
}

// (seconds, multiply-adds) of one operation on one tile of random float32 rows, best of `repeats` and over the tile widths.
std::pair<double, double> bench_op(Program<float> program, const Op& op, bool reverse, unsigned seed, int repeats) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  (reverse ? program.reverse : program.body).push_back(op);
  const Kernels<float>& table = *kernels().f32;
  const double nnz = program.matrices[op.matrix].nnz() * (op.carries ? 2.0 : 1.0);
  double best_rate = 0, best_seconds = 0, best_work = 0;
  for (int w = 0; w < Kernels<float>::kWidths; ++w) {
    if (reverse && table.gradient[0][w] == nullptr) continue;
    const std::unique_ptr<Packed<float>> packed = pack(program, table, w);
    const Stage<float> stage(program, *packed, table);
    Aligned<char> workspace(packed->workspace_bytes);
    Aligned<float> sums(packed->lasting_sums);
    float* x = reinterpret_cast<float*>(workspace.get());
    for (size_t i = 0; i < packed->workspace_bytes / sizeof(float); ++i) x[i] = uniform(random);
    const double work = nnz * packed->width;
    const int inner = std::max(1, int(2e7 / std::max(1.0, work)));
    const auto& ops = reverse ? packed->reverse : packed->body;
    const double seconds = seconds_of([&] { for (int i = 0; i < inner; ++i) stage.run(ops, workspace.get(), sums.get()); }, repeats) / inner;
    if (work / seconds > best_rate) best_rate = work / seconds, best_seconds = seconds, best_work = work;
  }
  return {best_seconds, best_work};
}

struct BenchMatrix {
  int rows, cols;
  double density;
  unsigned seed;
  int repeats;

  BenchMatrix(py::handle rows_, py::handle cols_, py::handle density_, py::handle seed_, py::handle repeats_)
      : rows(int(whole(rows_, "rows", 1, kMost))), cols(int(whole(cols_, "cols", 1, kMost))), density(real(density_, "density", 0.0, 1.0)),
        seed(unsigned(whole(seed_, "seed", 0, UINT_MAX))), repeats(int(whole(repeats_, "repeats", 1, kMost))) {
    if (int64_t(rows) * cols > int64_t(kMost) * 256) throw std::invalid_argument("rows * cols must be at most " + std::to_string(int64_t(kMost) * 256));
  }
  Matrix<float> make() const {
    std::mt19937 random(seed);
    return random_matrix(rows, cols, density, random);
  }

  static constexpr int kMost = 1 << 20;
};

// A sparse matrix times activations.
std::pair<double, double> bench_spmm(const py::object& rows, const py::object& cols, const py::object& density, const py::object& seed, const py::object& repeats) {
  const BenchMatrix of(rows, cols, density, seed, repeats);
  return interruptible([&] {
    Program<float> p;
    p.matrices.push_back(of.make());
    p.buffers = {{of.cols, 1}, {of.rows, 1}};
    Op op;
    op.kind = OpKind::kProduct;
    op.matrix = 0;
    op.source = {0, 0};
    op.target = {1, 0};
    return bench_op(std::move(p), op, false, of.seed, of.repeats);
  });
}

// The gradient of a sparse matrix: an inner product over the samples at each of its entries; `carries`: of values and
// tangents together.
std::pair<double, double> bench_sddmm(const py::object& rows, const py::object& cols, const py::object& density, bool carries, const py::object& seed, const py::object& repeats) {
  const BenchMatrix of(rows, cols, density, seed, repeats);
  return interruptible([&] {
    Program<float> p;
    p.matrices.push_back(of.make());
    p.buffers = {{of.cols, 2}, {of.rows, 2}};
    p.sums.push_back({p.matrices[0].nnz(), false});
    Op op;
    op.kind = OpKind::kGradient;
    op.matrix = 0;
    op.source = {0, 0};
    op.factor = {1, 0};
    op.sum = 0;
    op.carries = carries;
    return bench_op(std::move(p), op, true, of.seed, of.repeats);
  });
}

// Activations with slope per second of one core, on arrays in the first-level cache.
double activation_rate(const py::object& id, const py::object& repeats) {
  const int which = int(whole(id, "id", 0, kActivations - 1)), times = int(whole(repeats, "repeats", 1, BenchMatrix::kMost));
  const int n = 1536;
  std::vector<float> z(n), h(n), slope(n);
  for (int i = 0; i < n; ++i) z[i] = -6.0f + 12.0f * float(i) / float(n);
  return interruptible([&] {
    const double seconds = seconds_of([&] {
      for (int i = 0; i < 200; ++i) kernels().f32->activation(which, 1.0f, 20.0f, z.data(), n, h.data(), slope.data(), nullptr);
      look();
    }, times);
    return 200.0 * n / seconds;
  });
}

}  // namespace

void bind_linear(py::module_& m);       // linear.cpp
void bind_convolution(py::module_& m);  // convolution.cpp
void bind_snapshot(py::module_& m);  // snapshot.cpp

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU engine: sparse vector fields, tile by tile.";
  m.def("isa", [] { return std::string(kernels().name); }, "the instruction set in use");
  m.def("best_isa", [] { return std::string(best_isa()); }, "the best instruction set this processor runs, compiled or not");
  m.def("usable_cores", &usable_cores, "cores that this process may use: its affinity, or its control group's quota if that is less");
  m.def("force_threads", &force_threads, py::arg("on"),
        "for tests: every loop goes to all threads it allows, whatever its work and however busy the machine");
  m.def("isas", [] {
    const KernelSet* sets;
    const int n = available_sets(&sets);
    std::vector<std::string> names;
    for (int i = 0; i < n; ++i) names.push_back(sets[i].name);
    return names;
  }, "every compiled instruction set this machine can run");
  bind<float>(m, "BuilderF32", "ProgramF32", "AdjointF32");
  bind<double>(m, "BuilderF64", "ProgramF64", "AdjointF64");
  bind_linear(m);
  bind_convolution(m);
  bind_snapshot(m);
  m.attr("MOST_ROWS") = kMostRows;
  m.attr("MOST_ENTRIES") = kMostEntries;
  m.def("activation_f32", [](int id, double a, double b, const Array<float>& z, const std::string& isa) {
    return activation_with<float>(*find_set(isa).f32, id, a, b, z); },
    py::arg("id"), py::arg("a"), py::arg("b"), py::arg("z"), py::arg("isa") = "", "(value, slope) of an activation");
  m.def("activation_f64", [](int id, double a, double b, const Array<double>& z, const std::string& isa) {
    return activation_with<double>(*find_set(isa).f64, id, a, b, z); },
    py::arg("id"), py::arg("a"), py::arg("b"), py::arg("z"), py::arg("isa") = "", "(value, slope) of an activation");
  m.def("fma_peak", [](const py::object& seconds) {
    const double long_enough = real(seconds, "seconds", 1e-6, 3600.0);
    return interruptible([&] { return measure_fma_rate(long_enough); }); }, py::arg("seconds") = 0.2, "measured float32 multiply-adds per second of one core");
  m.def("bench_spmm", &bench_spmm, py::arg("rows"), py::arg("cols"), py::arg("density"), py::arg("seed") = 0, py::arg("repeats") = 15,
        "(seconds, multiply-adds) of one sparse product, at the best tile width");
  m.def("bench_sddmm", &bench_sddmm, py::arg("rows"), py::arg("cols"), py::arg("density"), py::arg("carries") = true, py::arg("seed") = 0,
        py::arg("repeats") = 15, "(seconds, multiply-adds) of the gradient of one sparse matrix, at the best tile width");
  m.def("activation_rate", &activation_rate, py::arg("id"), py::arg("repeats") = 15, "measured float32 activations with slope per second");
}
