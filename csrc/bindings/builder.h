// What the Python modules of all native engines share: the program builder, and how a solve's plain data is read. Arrays
// of a program come as numpy arrays and are checked and copied once.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "../field.h"
#include "../step_control.h"
#include "../tableau.h"
#include "../validate.h"
#include "arguments.h"
#include "window.h"

namespace sparseflow {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Ref = std::vector<int>;  // (buffer, slot) or (buffer, slot, row); buffer -1: absent

template <class T>
std::vector<T> copy(const Array<T>& a) {
  return std::vector<T>(a.data(), a.data() + a.size());
}
template <class T>
std::vector<T> copy(const std::optional<Array<T>>& a) {
  return a ? copy(*a) : std::vector<T>();
}
inline Operand operand(const Ref& r) {
  if (r.size() != 2 && r.size() != 3) throw std::invalid_argument("an operand is (buffer, slot) or (buffer, slot, row), not " + std::to_string(r.size()) + " numbers");
  return Operand{r[0], r[1], r.size() == 3 ? r[2] : 0};
}

template <class T>
class Builder {
 public:
  int matrix(int rows, int cols, const py::array& row_ptr, const py::array& col, const Array<T>& values, const std::optional<py::tuple>& window) {
    const Window w = window ? window_of(*window) : Window();
    Matrix<T>& m = add(rows, cols, row_ptr, col);
    m.values = copy(values);
    m.window = w;
    return last();
  }
  int gated_matrix(int rows, int cols, const py::array& row_ptr, const py::array& col, const py::array& entry,
                   const py::array& gate, const Array<T>& constant, int modulation) {
    Matrix<T>& m = add(rows, cols, row_ptr, col);
    m.gated = true;
    m.path_entry = indices(entry, "entry");
    m.path_gate = indices(gate, "gate");
    m.path_constant = copy(constant);
    m.gate_modulation = modulation;
    return last();
  }
  int external_matrix(int rows, int cols, const py::array& row_ptr, const py::array& col, int external) {
    add(rows, cols, row_ptr, col).external = external;
    return last();
  }
  int modulation(const Array<T>& bias, const std::optional<Array<T>>& gate_slope, const std::optional<Array<T>>& gate_offset,
                 const std::optional<Array<T>>& shift_slope, const std::optional<Array<T>>& shift_offset, int external_gate,
                 int external_shift) {
    Modulation<T> m;
    m.n = static_cast<int>(bias.size());
    m.bias = copy(bias);
    m.gate_slope = copy(gate_slope);
    m.gate_offset = copy(gate_offset);
    m.shift_slope = copy(shift_slope);
    m.shift_offset = copy(shift_offset);
    m.external_gate = external_gate;
    m.external_shift = external_shift;
    program_.modulations.push_back(std::move(m));
    return static_cast<int>(program_.modulations.size()) - 1;
  }
  int buffer(int rows, int slots) {
    program_.buffers.push_back({rows, slots});
    return static_cast<int>(program_.buffers.size()) - 1;
  }
  void roles(int dim, bool divergence, int input, int output, int noise, int ones, int externals) {
    program_.dim = dim;
    program_.divergence = divergence;
    program_.input = input;
    program_.output = output;
    program_.noise = noise;
    program_.ones = ones;
    program_.externals = externals;
  }
  void adjoint_roles(int cotangent, int trace_cotangent, int state_cotangent) {
    program_.cotangent = cotangent;
    program_.trace_cotangent = trace_cotangent;
    program_.state_cotangent = state_cotangent;
  }
  void graph_roles(int dim, int out, bool divergence, int input, int output, int ones, int context, int time_rows, int time_external, int externals) {
    roles(dim, divergence, input, output, -1, ones, externals);
    program_.out = out;
    program_.context = context;
    program_.time_rows = time_rows;
    program_.time_external = time_external;
  }
  void graph_adjoint_roles(int cotangent, int trace_cotangent, int state_cotangent, int context_cotangent) {
    adjoint_roles(cotangent, trace_cotangent, state_cotangent);
    program_.context_cotangent = context_cotangent;
  }
  int vector(int n, const std::optional<Array<T>>& values, int time_row) {
    RowVector<T> v;
    v.n = n;
    v.values = copy(values);
    v.time_row = time_row;
    program_.vectors.push_back(std::move(v));
    return static_cast<int>(program_.vectors.size()) - 1;
  }
  void sum_of_vector(int vector, int sum) { program_.vectors.at(vector).sum = sum; }
  int vector_modulation(int n, int scale, int shift) {
    Modulation<T> m;
    m.n = n;
    m.scale_vector = scale;
    m.shift_vector = shift;
    if (scale < 0 && shift < 0) m.bias.assign(static_cast<size_t>(std::clamp<int64_t>(n, 0, kMostRows)), T(0));  // of none, so of a bias of zeros
    program_.modulations.push_back(std::move(m));
    return static_cast<int>(program_.modulations.size()) - 1;
  }
  int expression(int inputs, int vectors, int outputs, int registers, const py::array& op, const py::array& to, const py::array& a,
                 const py::array& b, const py::array& c, const Array<double>& number) {
    Expression e;
    e.inputs = inputs, e.vectors = vectors, e.outputs = outputs, e.registers = registers;
    const std::vector<int32_t> ops = indices(op, "op"), tos = indices(to, "to"), as = indices(a, "a"), bs = indices(b, "b"), cs = indices(c, "c");
    const std::vector<double> numbers = copy(number);
    for (const auto* of : {&tos, &as, &bs, &cs})
      if (of->size() != ops.size() || numbers.size() != ops.size()) throw std::invalid_argument("op, to, a, b, c and number must be of one length");
    auto narrow = [](int32_t value, int32_t most, const char* name) {
      if (value < 0 || value > most) throw std::invalid_argument(std::string(name) + " must hold numbers from 0 to " + std::to_string(most) + ", not " + std::to_string(value));
      return value;
    };
    auto place = [&](int32_t value, const char* name) { return static_cast<uint16_t>(narrow(value, UINT16_MAX, name)); };
    for (size_t i = 0; i < ops.size(); ++i)
      e.code.push_back({static_cast<Instruct>(narrow(ops[i], UINT8_MAX, "op")), place(tos[i], "to"), place(as[i], "a"), place(bs[i], "b"),
                        place(cs[i], "c"), numbers[i]});
    program_.expressions.push_back(std::move(e));
    return static_cast<int>(program_.expressions.size()) - 1;
  }
  using Input = std::tuple<int, int, int, bool>;   // (buffer, slot, row, broadcast)
  using Numbers = std::tuple<int, int, bool>;      // (vector, first, broadcast)
  using Total = std::pair<int, Ref>;               // (place, row)
  void pointwise(int expression, int rows, const std::vector<Input>& inputs, const std::vector<Numbers>& vectors, const std::vector<Ref>& outputs,
                 const std::string& list, const std::vector<Total>& totals) {
    Op op;
    op.kind = OpKind::kPointwise;
    op.expression = expression;
    op.rows = rows;
    for (const auto& [buffer, slot, row, broadcast] : inputs) op.inputs.push_back({{buffer, slot, row}, broadcast});
    for (const auto& [vector, first, broadcast] : vectors) op.vectors.push_back({vector, first, broadcast});
    for (const Ref& out : outputs) op.outputs.push_back(operand(out));
    for (const auto& [place, row] : totals) op.totals.push_back({place, operand(row)});
    ops(list).push_back(op);
  }
  int sum(int size, bool each_stage) {
    program_.sums.push_back({size, each_stage});
    return static_cast<int>(program_.sums.size()) - 1;
  }
  void sum_of_matrix(int matrix, int sum) { program_.matrices.at(matrix).sum = sum; }
  void sums_of_modulation(int modulation, int shift, int gate) {
    program_.modulations.at(modulation).shift_sum = shift;
    program_.modulations.at(modulation).gate_sum = gate;
  }
  void keep(int matrix, Ref source, Ref target, int kept, int modulation, int activation, double a, double b, bool carries, bool curvature, bool raw,
            int slope_from) {
    Op op;
    op.kind = OpKind::kKeep;
    op.matrix = matrix;
    op.source = operand(source);
    op.target = operand(target);
    op.kept = {kept, 0};
    op.modulation = modulation;
    op.activation = static_cast<Activation>(activation);
    op.params = {a, b};
    op.carries = carries;
    op.curvature = curvature;
    op.raw = raw;
    op.slope_from = slope_from;
    program_.keep.push_back(op);
  }
  void pull(int matrix, Ref source, Ref target, int kept, Ref value, int modulation, Ref addend, Ref slope_cotangent, bool transposed, bool carries,
            bool curvature, bool raw, int slope_from) {
    Op op;
    op.kind = OpKind::kPull;
    op.matrix = matrix;
    op.transposed = transposed;
    op.source = operand(source);
    op.target = operand(target);
    op.kept = {kept, 0};
    op.value = operand(value);
    op.addend = operand(addend);
    op.slope_cotangent = operand(slope_cotangent);
    op.carries = carries;
    op.curvature = curvature;
    op.raw = raw;
    op.modulation = modulation;
    op.slope_from = slope_from;
    program_.reverse.push_back(op);
  }
  void gradient(int matrix, Ref left, Ref right, int sum, bool carries) {
    Op op;
    op.kind = OpKind::kGradient;
    op.matrix = matrix;
    op.factor = operand(left);
    op.source = operand(right);
    op.sum = sum;
    op.carries = carries;
    program_.reverse.push_back(op);
  }
  void affine(int matrix, Ref source, Ref target, int modulation, int activation, double a, double b, int store, Ref seed, Ref weight,
              const std::string& list) {
    Op op;
    op.kind = OpKind::kAffine;
    op.matrix = matrix;
    op.source = operand(source);
    op.target = operand(target);
    op.modulation = modulation;
    op.activation = static_cast<Activation>(activation);
    op.params = {a, b};
    op.store = store;
    op.seed = operand(seed);
    op.weight = operand(weight);
    ops(list).push_back(op);
  }
  void product(int matrix, Ref source, Ref target, Ref factor, const std::optional<py::array>& factor_row, bool prologue,
               bool transposed, Ref addend, bool second, Ref factor2, const std::optional<py::array>& factor2_row, const std::string& list) {
    Op op;
    op.transposed = transposed;
    op.addend = operand(addend);
    op.second = second;
    op.factor2 = operand(factor2);
    op.factor2_row = optional_indices(factor2_row, "factor2_row");
    op.kind = OpKind::kProduct;
    op.matrix = matrix;
    op.source = operand(source);
    op.target = operand(target);
    op.factor = operand(factor);
    op.factor_row = optional_indices(factor_row, "factor_row");
    (prologue ? program_.prologue : ops(list)).push_back(op);
  }
  void reduction(int matrix, Ref source, Ref factor, Ref factor2, const std::optional<py::array>& factor_row,
                 const std::optional<py::array>& factor2_row, int coefficient_matrix, Ref target) {
    Op op;
    op.kind = OpKind::kReduction;
    op.matrix = matrix;
    op.source = operand(source);
    op.factor = operand(factor);
    op.factor2 = operand(factor2);
    op.factor_row = optional_indices(factor_row, "factor_row");
    op.factor2_row = optional_indices(factor2_row, "factor2_row");
    op.coefficient_matrix = coefficient_matrix;
    op.target = operand(target);
    program_.body.push_back(op);
  }
  const Program<T>& program() const { return program_; }

 private:
  Matrix<T>& add(int rows, int cols, const py::array& row_ptr, const py::array& col) {
    Matrix<T> m;
    m.rows = rows;
    m.cols = cols;
    m.row_ptr = indices(row_ptr, "row_ptr");
    m.col = indices(col, "col");
    program_.matrices.push_back(std::move(m));
    return program_.matrices.back();
  }
  static std::vector<int32_t> optional_indices(const std::optional<py::array>& values, const char* name) {
    return values ? indices(*values, name) : std::vector<int32_t>();
  }
  int last() const { return static_cast<int>(program_.matrices.size()) - 1; }
  std::vector<Op>& ops(const std::string& list) {
    if (list == "prologue") return program_.prologue;
    if (list == "body") return program_.body;
    if (list == "keep") return program_.keep;
    if (list == "reverse") return program_.reverse;
    throw std::invalid_argument("no list of operations is called '" + list + "'");
  }

  Program<T> program_;
};

template <class T>
py::class_<Builder<T>> bind_builder(py::module_& m, const char* name) {
  py::class_<Builder<T>> c(m, name, py::module_local(), "Collects the parts of a program (csrc/field.h); compiling checks them.");
  c.def(py::init<>())
      .def("matrix", &Builder<T>::matrix, py::arg("rows"), py::arg("cols"), py::arg("row_ptr"), py::arg("col"), py::arg("values"),
           py::arg("window") = py::none(), "with a window (window.h), a convolution")
      .def("gated_matrix", &Builder<T>::gated_matrix, py::arg("rows"), py::arg("cols"), py::arg("row_ptr"), py::arg("col"),
           py::arg("entry"), py::arg("gate"), py::arg("constant"), py::arg("modulation"))
      .def("external_matrix", &Builder<T>::external_matrix, py::arg("rows"), py::arg("cols"), py::arg("row_ptr"), py::arg("col"),
           py::arg("external"))
      .def("modulation", &Builder<T>::modulation, py::arg("bias"), py::arg("gate_slope") = py::none(), py::arg("gate_offset") = py::none(),
           py::arg("shift_slope") = py::none(), py::arg("shift_offset") = py::none(), py::arg("external_gate") = -1,
           py::arg("external_shift") = -1)
      .def("buffer", &Builder<T>::buffer, py::arg("rows"), py::arg("slots") = 1)
      .def("roles", &Builder<T>::roles, py::arg("dim"), py::arg("divergence"), py::arg("input"), py::arg("output"), py::arg("noise") = -1,
           py::arg("ones") = -1, py::arg("externals") = 0)
      .def("affine", &Builder<T>::affine, py::arg("matrix"), py::arg("source"), py::arg("target"), py::arg("modulation"),
           py::arg("activation"), py::arg("a") = 1.0, py::arg("b") = 20.0, py::arg("store") = 0, py::arg("seed") = Ref{-1, 0},
           py::arg("weight") = Ref{-1, 0}, py::arg("list") = "body")
      .def("product", &Builder<T>::product, py::arg("matrix"), py::arg("source"), py::arg("target"), py::arg("factor") = Ref{-1, 0},
           py::arg("factor_row") = py::none(), py::arg("prologue") = false, py::arg("transposed") = false, py::arg("addend") = Ref{-1, 0},
           py::arg("second") = false, py::arg("factor2") = Ref{-1, 0}, py::arg("factor2_row") = py::none(), py::arg("list") = "body")
      .def("reduction", &Builder<T>::reduction, py::arg("matrix"), py::arg("source"), py::arg("factor") = Ref{-1, 0},
           py::arg("factor2") = Ref{-1, 0}, py::arg("factor_row") = py::none(), py::arg("factor2_row") = py::none(),
           py::arg("coefficient_matrix") = -1, py::arg("target") = Ref{-1, 0})
      .def("adjoint_roles", &Builder<T>::adjoint_roles, py::arg("cotangent"), py::arg("trace_cotangent"), py::arg("state_cotangent"))
      .def("graph_roles", &Builder<T>::graph_roles, py::arg("dim"), py::arg("out"), py::arg("divergence"), py::arg("input"), py::arg("output"),
           py::arg("ones") = -1, py::arg("context") = -1, py::arg("time_rows") = 0, py::arg("time_external") = -1, py::arg("externals") = 0)
      .def("graph_adjoint_roles", &Builder<T>::graph_adjoint_roles, py::arg("cotangent"), py::arg("trace_cotangent") = -1,
           py::arg("state_cotangent") = -1, py::arg("context_cotangent") = -1)
      .def("vector", &Builder<T>::vector, py::arg("n"), py::arg("values") = py::none(), py::arg("time_row") = -1,
           "a number per row, the same for all samples: constant, or rows of the time answer")
      .def("sum_of_vector", &Builder<T>::sum_of_vector, py::arg("vector"), py::arg("sum"))
      .def("vector_modulation", &Builder<T>::vector_modulation, py::arg("n"), py::arg("scale") = -1, py::arg("shift") = -1)
      .def("expression", &Builder<T>::expression, py::arg("inputs"), py::arg("vectors"), py::arg("outputs"), py::arg("registers"), py::arg("op"),
           py::arg("to"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("number"), "an elementwise function, instruction by instruction (csrc/expression.h)")
      .def("pointwise", &Builder<T>::pointwise, py::arg("expression"), py::arg("rows"), py::arg("inputs"), py::arg("vectors"), py::arg("outputs"),
           py::arg("list") = "body", py::arg("totals") = std::vector<typename Builder<T>::Total>{})
      .def("sum", &Builder<T>::sum, py::arg("size"), py::arg("each_stage"))
      .def("sum_of_matrix", &Builder<T>::sum_of_matrix, py::arg("matrix"), py::arg("sum"))
      .def("sums_of_modulation", &Builder<T>::sums_of_modulation, py::arg("modulation"), py::arg("shift"), py::arg("gate"))
      .def("keep", &Builder<T>::keep, py::arg("matrix"), py::arg("source"), py::arg("target"), py::arg("kept"), py::arg("modulation"),
           py::arg("activation"), py::arg("a"), py::arg("b"), py::arg("carries"), py::arg("curvature"), py::arg("raw"),
           py::arg("slope_from") = 0)
      .def("pull", &Builder<T>::pull, py::arg("matrix"), py::arg("source"), py::arg("target"), py::arg("kept"), py::arg("value"),
           py::arg("modulation"), py::arg("addend") = Ref{-1, 0}, py::arg("slope_cotangent") = Ref{-1, 0}, py::arg("transposed") = true, py::arg("carries") = false,
           py::arg("curvature") = false, py::arg("raw") = false, py::arg("slope_from") = 0)
      .def("gradient", &Builder<T>::gradient, py::arg("matrix"), py::arg("left"), py::arg("right"), py::arg("sum"), py::arg("carries") = false);
  return c;
}

inline Tableau tableau_of(const py::dict& tableau) {
  Tableau out;
  out.adaptive = tableau["adaptive"].cast<bool>();
  out.order = tableau["order"].cast<int>();
  out.c = tableau["c"].cast<std::vector<double>>();
  out.a = tableau["a"].cast<std::vector<std::vector<double>>>();
  out.b = tableau["b"].cast<std::vector<double>>();
  out.b_error = tableau["b_error"].cast<std::vector<double>>();
  out.b_mid = tableau["b_mid"].cast<std::vector<double>>();
  const size_t stages = out.c.size() + 1;
  bool fits = out.a.size() + 1 == stages && out.b.size() == stages;
  if (out.adaptive) fits = fits && out.b_error.size() == stages && out.b_mid.size() == stages && stages > 1;
  for (size_t i = 0; i < out.a.size(); ++i) fits = fits && out.a[i].size() == i + 1;
  if (!fits) throw std::invalid_argument("solve: the tableau's arrays do not fit each other");
  return out;
}

// Ascending, as many as there are.
inline std::vector<double> points_of(std::vector<double> points, const char* name, bool repeat = false) {
  for (size_t i = 0; i < points.size(); ++i)
    if (!std::isfinite(points[i]) || (i > 0 && (repeat ? points[i] < points[i - 1] : points[i] <= points[i - 1])))
      throw std::invalid_argument(std::string(name) + " must be finite and ascend, and number " + std::to_string(i) + " is " + std::to_string(points[i]));
  return points;
}

inline StepOptions options_of(const py::dict& options) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  auto number = [&](const char* name) { return real(options[name], name, -kInfinity, kInfinity); };
  StepOptions out;
  out.min_step = number("min_step");
  out.max_step = number("max_step");
  if (!options["first_step"].is_none()) out.first_step = options["first_step"].cast<double>();
  out.safety = number("safety");
  out.ifactor = number("ifactor");
  out.dfactor = number("dfactor");
  out.max_num_steps = whole(options["max_num_steps"], "max_num_steps", INT64_MIN, INT64_MAX);
  out.stop_at_outputs = options["stop_at_outputs"].cast<bool>();
  out.step_t = points_of(options["step_t"].cast<std::vector<double>>(), "step_t", true);
  out.jump_t = points_of(options["jump_t"].cast<std::vector<double>>(), "jump_t", true);
  return out;
}

}  // namespace sparseflow
