// Python's view of the CUDA engine: a program builder, the image it makes for a GPU, and launches. Everything a kernel reads
// or writes lies in memory of the caller's (torch's), given by addresses that the caller has checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "../cuda/launch.h"
#include "../cuda/plan.h"
#include "../cuda/tableau.h"
#include "builder.h"

#ifndef SPARSEFLOW_MODULE_NAME
#define SPARSEFLOW_MODULE_NAME _cuda
#endif

namespace py = pybind11;
using namespace sparseflow;
using namespace sparseflow::cuda;

namespace {

void check(int code, const char* what) {
  if (code == 0) return;
  std::string message = std::string(what) + " failed: " + say(code);
  if (context_is_lost(code)) message += "; the device's state in this process is lost, and every later call on it will fail: start the process anew";
  throw std::runtime_error(message);
}

int device_number(py::handle value) { return int(whole(value, "device", 0, INT_MAX)); }
int blocks_of(py::handle value) { return int(whole(value, "blocks", 1, INT_MAX)); }

Device device_of(const py::dict& d) {
  auto count = [&](const char* name) { return int(whole(d[name], name, 1, INT_MAX)); };
  return {count("multiprocessors"), count("shared_per_block"), count("shared_per_multiprocessor"), count("threads_per_multiprocessor")};
}

template <class V>
py::array_t<V> array_of(const std::vector<V>& values) {
  py::array_t<V> out(py::ssize_t(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

Instance instance_of(const Plan& plan) { return {plan.shape.per_thread, plan.work_in_shared}; }

template <class T>
py::tuple range_of(const typename Image<T>::Range& range) {
  return py::make_tuple(range.first, range.size);
}

template <class T>
DeviceProgram program_at(const Image<T>& image, uintptr_t at) {
  if (at == 0 || at % 16 != 0) throw std::invalid_argument("image: an address divisible by 16 is needed");
  DeviceProgram program = image.program;
  program.image = address<const char>(at);
  return program;
}

void check_graph(const DeviceProgram& program, uintptr_t context, bool own_times, const char* what) {
  if (program.context.row >= 0 && context == 0) throw std::invalid_argument(std::string(what) + ": this program needs a context");
  if (own_times && !program.time_in_input) throw std::invalid_argument(std::string(what) + ": this program has one time for all samples");
}

// Blocks that a multiprocessor takes at once, by the driver.
template <class T>
int occupancy(const Image<T>& image, const Plan& plan, const py::object& device) {
  int blocks = 0;
  const bool adjoint = image.program.list[kReverse + 1] > image.program.list[kReverse];
  check((adjoint ? adjoint_occupancy<T> : solve_occupancy<T>)(instance_of(plan), device_number(device), plan.block.threads, plan.block.shared_bytes, blocks), "asking for the kernel's occupancy");
  return blocks;
}

template <class T>
void evaluate(const Image<T>& self, const Plan& plan, uintptr_t image, const py::object& device, const py::object& blocks, uintptr_t stream, uintptr_t global,
              const py::object& batch, uintptr_t x, uintptr_t noise, double time_value, uintptr_t time, uintptr_t f, uintptr_t trace, uintptr_t context, bool own_times) {
  SolveParams<T> p;
  p.program = program_at(self, image);
  p.plan = plan.block;
  p.batch = batch_of(batch);
  p.tiles = plan.tiles;
  const Launch launch{device_number(device), blocks_of(blocks), address<void>(stream), false};
  p.x = address<T>(x), p.noise = address<T>(noise);
  p.global = address<char>(global);
  p.evaluate = true;
  p.f = address<T>(f), p.f_trace = address<T>(trace);
  p.time = address<T>(time);
  p.time_value = T(time_value);
  p.context = address<T>(context), p.own_times = own_times;
  check_graph(p.program, context, own_times, "evaluate");
  if (trace != 0 && p.program.noise.row >= 0 && noise == 0) throw std::invalid_argument("evaluate: this program needs noise");
  py::gil_scoped_release release;
  check(launch_solve<T>(p, instance_of(plan), launch), "the evaluation's launch");
}

template <class T>
void solve(const Image<T>& self, const Plan& plan, const py::dict& a) {
  auto number = [&](const char* name) { return int(whole(a[name], name, 0, INT_MAX)); };
  auto at = [&](const char* name) { return a[name].cast<uintptr_t>(); };
  SolveParams<T> p;
  p.program = program_at(self, at("image"));
  p.plan = plan.block;
  p.batch = batch_of(a["batch"]);
  p.tiles = plan.tiles;
  p.x = address<T>(at("x")), p.l = address<T>(at("l")), p.noise = address<T>(at("noise"));
  p.global = address<char>(at("global"));
  const bool shared = a["shared"].cast<bool>();
  p.control = shared ? Control::kShared : Control::kPerTile;
  p.tableau = a["tableau"].cast<const DeviceTableau&>();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto parts = a["parts"].cast<std::vector<int>>();  // rows of the tensors of the state; the log-density comes behind them
  const auto rtol = a["rtol"].cast<std::vector<py::object>>(), atol = a["atol"].cast<std::vector<py::object>>();
  const size_t components = parts.size() + p.program.divergence;
  if (parts.empty() || components > size_t(kMaxComponents)) throw std::invalid_argument("solve: from 1 to " + std::to_string(kMaxComponents) + " components, not " + std::to_string(components));
  if (rtol.size() != components || atol.size() != components) throw std::invalid_argument("solve: a tolerance for every component is needed");
  int64_t rows = 0;
  for (size_t i = 0; i < components; ++i) {
    const int own = i < parts.size() ? parts[i] : 1;
    if (own < 1) throw std::invalid_argument("solve: a component has no rows");
    rows += own;
    if (rows > p.program.dim + p.program.divergence) throw std::invalid_argument("solve: the components have more rows than the state");
    p.add_component(own, real(rtol[i], "rtol", 0.0, kInfinity), real(atol[i], "atol", 0.0, kInfinity));
  }
  if (rows != p.program.dim + p.program.divergence) throw std::invalid_argument("solve: the components have fewer rows than the state");
  const StepOptions options = options_of(a["options"]);
  p.rule = options;
  p.first_step = options.first_step;
  p.sign = sign_of(a["sign"]), p.perturb = a["perturb"].cast<bool>();
  p.n_times = number("n_times"), p.n_grid = number("n_grid"), p.n_step_t = int(options.step_t.size()), p.n_jump_t = int(options.jump_t.size());
  p.times = address<double>(at("times"));
  p.xs = address<T>(at("xs")), p.ls = address<T>(at("ls"));
  p.tile_state = address<T>(at("tile_state"));
  p.blame = address<double>(at("blame"));
  p.stats = address<SolveStats>(at("stats"));
  p.slots = address<double>(at("slots"));
  p.barrier = address<unsigned long long>(at("barrier"));
  p.next_tile = address<int>(at("next_tile"));
  p.stop = address<int>(at("stop"));
  p.step_capacity = number("step_capacity");
  p.steps = address<double>(at("steps"));
  p.record = a["record"].cast<bool>();
  p.capacity = number("capacity");
  if (p.record && !shared) throw std::invalid_argument("solve: tiles that step on their own record no common steps");
  p.states = address<T>(at("states")), p.derivatives = address<T>(at("derivatives"));
  p.x_slopes = address<T>(at("x_slopes")), p.l_slopes = address<T>(at("l_slopes"));
  p.context = address<T>(at("context"));
  check_graph(p.program, at("context"), false, "solve");
  if (p.program.noise.row >= 0 && p.noise == nullptr) throw std::invalid_argument("solve: this program needs noise");
  if (p.program.divergence && (p.l == nullptr || p.ls == nullptr)) throw std::invalid_argument("solve: a divergence needs l");
  if (p.n_times < 1) throw std::invalid_argument("solve: no output times");
  const int blocks = blocks_of(a["blocks"]);
  if (shared && p.tiles > blocks && p.tile_state == nullptr) throw std::invalid_argument("solve: several tiles to a block need memory for their states");
  const Launch launch{device_number(a["device"]), blocks, address<void>(at("stream")), shared && blocks > 1};
  py::gil_scoped_release release;
  check(launch_solve<T>(p, instance_of(plan), launch), "the solve's launch");
}

template <class T>
void backward(const Image<T>& self, const Plan& plan, const py::dict& a) {
  auto number = [&](const char* name) { return int(whole(a[name], name, 0, INT_MAX)); };
  auto at = [&](const char* name) { return a[name].cast<uintptr_t>(); };
  AdjointParams<T> p;
  p.program = program_at(self, at("image"));
  p.plan = plan.block;
  p.batch = batch_of(a["batch"]);
  p.tiles = plan.tiles;
  p.x = address<T>(at("x")), p.noise = address<T>(at("noise"));
  p.global = address<char>(at("global"));
  p.sums = address<T>(at("sums")), p.stage_sums = address<T>(at("stage_sums"));
  p.grad_x = address<T>(at("grad_x")), p.grad_l = address<T>(at("grad_l"));
  p.evaluate = a["evaluate"].cast<bool>();
  p.context = address<T>(at("context")), p.grad_context = address<T>(at("grad_context"));
  p.own_times = a["own_times"].cast<bool>(), p.grad_times = address<T>(at("grad_times"));
  check_graph(p.program, at("context"), p.own_times, "backward");
  if (p.own_times && (!p.evaluate || p.grad_times == nullptr)) throw std::invalid_argument("backward: times of the samples' own need a place for their gradient");
  if (p.evaluate) {
    p.tableau = {};
    p.tableau.stages = 1;
    p.grad_f = address<T>(at("grad_f")), p.grad_trace = address<T>(at("grad_trace"));
    p.time = address<T>(at("time"));
    p.time_value = T(a["time_value"].cast<double>());
  } else {
    p.tableau = a["tableau"].cast<const DeviceTableau&>();
    p.sign = sign_of(a["sign"]), p.perturb = a["perturb"].cast<bool>();
    p.n_times = number("n_times"), p.n_steps = number("n_steps");
    p.times = address<double>(at("times")), p.steps = address<double>(at("steps"));
    p.states = address<T>(at("states")), p.derivatives = address<T>(at("derivatives"));
    p.grad_xs = address<T>(at("grad_xs")), p.grad_ls = address<T>(at("grad_ls"));
  }
  if (p.program.noise.row >= 0 && p.noise == nullptr) throw std::invalid_argument("backward: this program needs noise");
  const Launch launch{device_number(a["device"]), blocks_of(a["blocks"]), address<void>(at("stream")), false};
  py::gil_scoped_release release;
  check(launch_adjoint<T>(p, instance_of(plan), launch), "the backward pass's launch");
}

template <class T>
void bind(py::module_& m, const char* builder, const char* name) {
  bind_builder<T>(m, builder)
      .def("image", [](const Builder<T>& b, bool cut, const py::object& dense_above) {
        const double density = real(dense_above, "dense_above", 0.0, std::numeric_limits<double>::infinity());
        return interruptible([&] { return make_image(b.program(), cut ? kChunkBytes : kUncut, density); });
      },
           py::arg("cut") = false, py::arg("dense_above") = 2.0,
           "the program laid out for a GPU; cut: its streams in pieces that can pass through shared memory; dense_above: the density from which a matrix "
           "is stored whole");

  using I = Image<T>;
  py::class_<I>(m, name, py::module_local(), "A checked program laid out for a GPU (csrc/cuda/image.h).")
      .def_property_readonly("bytes", [](const I& i) {
        py::array_t<uint8_t> out(py::ssize_t(i.bytes.size()));
        std::memcpy(out.mutable_data(), i.bytes.data(), i.bytes.size());
        return out;
      })
      .def_property_readonly("dense", [](const I& i) { return std::vector<bool>(i.dense.begin(), i.dense.end()); }, "by matrix: whether it is stored whole")
      .def_property_readonly("stream_bytes", [](const I& i) { return i.program.stream_bytes; })
      .def_property_readonly("workspace_rows", [](const I& i) { return i.program.workspace_rows; }, "numbers per sample that a tile's activations take")
      .def_property_readonly("sums", [](const I& i) { return i.program.lasting_sums + i.program.totals; }, "numbers a block adds gradients up in; the last is that of t")
      .def_property_readonly("stage_sums", [](const I& i) { return i.program.stage_sums; })
      .def("matrix_places", [](const I& i, int n) { return py::make_tuple(array_of(i.matrices.at(n).place), array_of(i.matrices.at(n).entry)); }, py::arg("matrix"),
           "(place, entry): image, as numbers, at place[k] is the matrix's number entry[k]")
      .def("modulation_places", [](const I& i, int n) {
             const auto& p = i.modulations.at(n);
             py::dict out;
             out["n"] = p.n, out["bias"] = p.bias;
             out["gate_slope"] = p.gate_slope, out["gate_offset"] = p.gate_offset, out["shift_slope"] = p.shift_slope, out["shift_offset"] = p.shift_offset;
             return out;
           }, py::arg("modulation"), "where its arrays begin in the image, as numbers; -1: it has none")
      .def("vector_place", [](const I& i, int n) { return i.vectors.at(n); }, py::arg("vector"), "where its numbers begin in the image, as numbers")
      .def("vector_gradient", [](const I& i, int n) { return range_of<T>(i.vector_gradients.at(n)); }, py::arg("vector"))
      .def("matrix_gradient", [](const I& i, int n) { return range_of<T>(i.matrix_gradients.at(n)); }, py::arg("matrix"))
      .def("modulation_gradients", [](const I& i, int n) {
             const auto& t = i.time_gradients.at(n);
             py::dict out;
             out["bias"] = range_of<T>(i.bias_gradients.at(n));
             out["gate.slope"] = range_of<T>(t.gate_slope), out["gate.offset"] = range_of<T>(t.gate_offset);
             out["shift.slope"] = range_of<T>(t.shift_slope), out["shift.offset"] = range_of<T>(t.shift_offset);
             return out;
           }, py::arg("modulation"), "(first, size) among a block's sums; first -1: none")
      .def("plans", [](const I& i, const py::dict& device, const py::object& batch, const py::object& stages, bool per_tile, bool per_sample) {
             const bool adjoint = i.program.list[kReverse + 1] > i.program.list[kReverse];
             return plans(i, device_of(device), batch_of(batch), int(whole(stages, "stages", 1, kMaxStages)), adjoint, per_tile, per_sample);
           }, py::arg("device"), py::arg("batch"), py::arg("stages"), py::arg("per_tile") = false, py::arg("per_sample") = false,
           "the launch shapes that fit, the one expected to be the quickest first")
      .def("occupancy", &occupancy<T>, py::arg("plan"), py::arg("device"), "blocks a multiprocessor takes at once")
      .def("evaluate", &evaluate<T>, py::arg("plan"), py::arg("image"), py::arg("device"), py::arg("blocks"), py::arg("stream"), py::arg("global_memory"), py::arg("batch"),
           py::arg("x"), py::arg("noise"), py::arg("time_value"), py::arg("time"), py::arg("f"), py::arg("trace"), py::arg("context") = 0, py::arg("own_times") = false)
      .def("solve", &solve<T>, py::arg("plan"), py::arg("arguments"))
      .def("backward", &backward<T>, py::arg("plan"), py::arg("arguments"));
}

#define SF_MODULE(name, variable) PYBIND11_MODULE(name, variable)

}  // namespace

SF_MODULE(SPARSEFLOW_MODULE_NAME, m) {
  m.doc() = "The CUDA engine: whole solves of sparse vector fields in one launch.";
  m.attr("SUMS") = kSums;
  m.attr("REGISTERS") = kRegisters;
  m.attr("COMPONENTS") = kMaxComponents;
  py::class_<DeviceTableau>(m, "Tableau", py::module_local(), "A Runge-Kutta method, checked, as kernels take it.")
      .def(py::init([](const py::dict& tableau) { return device_tableau(tableau_of(tableau)); }), py::arg("tableau"));
  py::class_<Plan>(m, "Plan", py::module_local(), "How a kernel would be launched (csrc/cuda/plan.h).")
      .def_property_readonly("shape", [](const Plan& p) { return py::make_tuple(p.shape.tile, p.shape.per_thread, p.shape.parts, p.shape.threads); },
                             "(samples to a tile, to a thread, parts to a row, threads)")
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("cycles", &Plan::cycles)
      .def_readonly("reason", &Plan::reason)
      .def_readonly("work_in_shared", &Plan::work_in_shared)
      .def_property_readonly("resident", [](const Plan& p) { return p.block.resident != 0; })
      .def_property_readonly("shared_bytes", [](const Plan& p) { return p.block.shared_bytes; })
      .def_property_readonly("global_bytes", [](const Plan& p) { return p.block.global_bytes; }, "of global memory, for every block");
  bind<float>(m, "BuilderF32", "ImageF32");
  bind<double>(m, "BuilderF64", "ImageF64");
  m.def("probe", [] {
    const Probe p = probe();
    py::list devices;
    for (const DeviceInfo& d : p.devices) {
      py::dict one;
      one["name"] = d.name, one["major"] = d.major, one["minor"] = d.minor;
      one["multiprocessors"] = d.multiprocessors, one["shared_per_block"] = d.shared_per_block;
      one["shared_per_multiprocessor"] = d.shared_per_multiprocessor, one["threads_per_multiprocessor"] = d.threads_per_multiprocessor;
      one["memory"] = d.memory;
      devices.append(one);
    }
    py::dict out;
    out["runtime"] = p.runtime, out["driver"] = p.driver, out["code"] = p.code, out["error"] = p.error, out["devices"] = devices;
    return out;
  }, "the runtime's and the driver's versions (0: no driver), the devices, and what went wrong; never raises");
}
