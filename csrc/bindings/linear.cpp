// Python's view of a sparse linear layer (cpu/linear.h).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../cpu/linear.h"
#include "arguments.h"

namespace py = pybind11;
using namespace sparseflow;

namespace {

int64_t samples_of(py::handle batch) { return whole(batch, "batch", 0, int64_t(1) << 36); }  // whose tiles are counted in 32 bits

template <class T>
void bind(py::module_& m, const char* name) {
  using Linear = SparseLinear<T>;
  py::class_<Linear>(m, name, "The products of one sparse linear layer; batches are addresses of contiguous memory that the caller has checked.")
      .def(py::init([](int rows, int cols, const py::array& row_ptr, const py::array& col) {
             std::vector<int32_t> pointers = indices(row_ptr, "row_ptr"), columns = indices(col, "col");
             if constexpr (sizeof(T) == 4) return std::make_unique<Linear>(rows, cols, std::move(pointers), std::move(columns), *kernels().f32);
             else return std::make_unique<Linear>(rows, cols, std::move(pointers), std::move(columns), *kernels().f64);
           }),
           py::arg("rows"), py::arg("cols"), py::arg("row_ptr"), py::arg("col"))
      .def(
          "multiply",
          [](Linear& self, bool transposed, uintptr_t values, uintptr_t x, const py::object& batch, uintptr_t bias, const py::object& threads, uintptr_t out) {
            const int64_t samples = samples_of(batch);
            const int workers = threads_of(threads), in = transposed ? self.rows() : self.cols(), of = transposed ? self.cols() : self.rows();
            const T *weights = address<T>(values, "values", samples > 0 && self.nnz() > 0), *from = address<T>(x, "x", samples > 0 && in > 0);
            const T* more = address<T>(bias, "bias", false);
            T* const to = address<T>(out, "out", samples > 0 && of > 0);
            interruptible([&] { self.multiply(transposed, weights, from, samples, more, workers, to); });
          },
          py::arg("transposed"), py::arg("values"), py::arg("x"), py::arg("batch"), py::arg("bias"), py::arg("threads"),
          py::arg("out"))
      .def(
          "gradient",
          [](Linear& self, uintptr_t left, uintptr_t right, const py::object& batch, const py::object& threads, uintptr_t sums) {
            const int64_t samples = samples_of(batch);
            const int workers = threads_of(threads);
            const bool any = samples > 0 && self.nnz() > 0;
            const T *of_out = address<T>(left, "left", any), *from = address<T>(right, "right", any);
            T* const to = address<T>(sums, "sums", self.nnz() > 0);
            interruptible([&] { self.gradient(of_out, from, samples, workers, to); });
          },
          py::arg("left"), py::arg("right"), py::arg("batch"), py::arg("threads"), py::arg("sums"))
      .def("force_width", [](Linear& self, const py::object& index) {
             const int number = static_cast<int>(whole(index, "index", INT_MIN, INT_MAX));
             interruptible([&] { self.force_width(number); });
           }, py::arg("index"),
           "products in tiles of this width from now on; -1: as the batch asks for");
}

}  // namespace

void bind_linear(py::module_& m) {
  bind<float>(m, "SparseLinearF32");
  bind<double>(m, "SparseLinearF64");
}
