// Python's view of a sparse linear layer (cpu/linear.h).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../cpu/linear.h"

namespace py = pybind11;
using namespace sparseflow;

namespace {

template <class T>
T* address(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

using Indices = py::array_t<int32_t, py::array::c_style>;

std::vector<int32_t> copy(const Indices& a) { return {a.data(), a.data() + a.size()}; }

template <class T>
void bind(py::module_& m, const char* name) {
  using Linear = SparseLinear<T>;
  py::class_<Linear>(m, name, "The products of one sparse linear layer; batches are addresses of contiguous memory that the caller has checked.")
      .def(py::init([](int rows, int cols, const Indices& row_ptr, const Indices& col) {
             if constexpr (sizeof(T) == 4) return std::make_unique<Linear>(rows, cols, copy(row_ptr), copy(col), *kernels().f32);
             else return std::make_unique<Linear>(rows, cols, copy(row_ptr), copy(col), *kernels().f64);
           }),
           py::arg("rows"), py::arg("cols"), py::arg("row_ptr"), py::arg("col"))
      .def(
          "multiply",
          [](Linear& self, bool transposed, uintptr_t values, uintptr_t x, int64_t batch, uintptr_t bias, int threads, uintptr_t out) {
            py::gil_scoped_release release;
            self.multiply(transposed, address<T>(values), address<T>(x), batch, address<T>(bias), threads, address<T>(out));
          },
          py::arg("transposed"), py::arg("values"), py::arg("x"), py::arg("batch"), py::arg("bias"), py::arg("threads"),
          py::arg("out"))
      .def(
          "gradient",
          [](Linear& self, uintptr_t left, uintptr_t right, int64_t batch, int threads, uintptr_t sums) {
            py::gil_scoped_release release;
            self.gradient(address<T>(left), address<T>(right), batch, threads, address<T>(sums));
          },
          py::arg("left"), py::arg("right"), py::arg("batch"), py::arg("threads"), py::arg("sums"))
      .def("force_width", &Linear::force_width, py::call_guard<py::gil_scoped_release>(), py::arg("index"),
           "products in tiles of this width from now on; -1: as the batch asks for");
}

}  // namespace

void bind_linear(py::module_& m) {
  bind<float>(m, "SparseLinearF32");
  bind<double>(m, "SparseLinearF64");
}
