// Python's view of a sparse convolution (cpu/convolution.h).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../cpu/convolution.h"
#include "window.h"

namespace py = pybind11;
using namespace sparseflow;

namespace {

template <class T>
void bind(py::module_& m, const char* name) {
  using Convolution = SparseConvolution<T>;
  py::class_<Convolution>(m, name, "The products of one sparse convolution; batches are addresses of contiguous memory that the caller has checked.")
      .def(py::init([](const py::object& out, const py::object& in, const py::array& row_ptr, const py::array& col, const py::tuple& window) {
             const int planes_out = static_cast<int>(whole(out, "out", 0, INT_MAX)), planes_in = static_cast<int>(whole(in, "in", 0, INT_MAX));
             std::vector<int32_t> pointers = indices(row_ptr, "row_ptr"), columns = indices(col, "col");
             const Window w = window_of(window);
             if constexpr (sizeof(T) == 4) return std::make_unique<Convolution>(planes_out, planes_in, std::move(pointers), std::move(columns), w, *kernels().f32);
             else return std::make_unique<Convolution>(planes_out, planes_in, std::move(pointers), std::move(columns), w, *kernels().f64);
           }),
           py::arg("out"), py::arg("in"), py::arg("row_ptr"), py::arg("col"), py::arg("window"))
      .def(
          "multiply",
          [](Convolution& self, bool transposed, uintptr_t values, uintptr_t x, const py::object& batch, uintptr_t bias, const py::object& threads, uintptr_t out) {
            const int64_t samples = whole(batch, "batch", 0, int64_t(1) << 20);  // whose strips are counted in 32 bits
            const int workers = threads_of(threads);
            const T *weights = address<T>(values, "values", samples > 0 && self.nnz() > 0), *from = address<T>(x, "x", samples > 0);
            const T* more = address<T>(bias, "bias", false);
            T* const to = address<T>(out, "out", samples > 0);
            interruptible([&] { self.multiply(transposed, weights, from, samples, more, workers, to); });
          },
          py::arg("transposed"), py::arg("values"), py::arg("x"), py::arg("batch"), py::arg("bias"), py::arg("threads"),
          py::arg("out"))
      .def(
          "gradient",
          [](Convolution& self, uintptr_t left, uintptr_t right, const py::object& batch, const py::object& threads, uintptr_t sums) {
            const int64_t samples = whole(batch, "batch", 0, int64_t(1) << 20);
            const int workers = threads_of(threads);
            const bool any = samples > 0 && self.nnz() > 0;
            const T *of_out = address<T>(left, "left", any), *from = address<T>(right, "right", any);
            T* const to = address<T>(sums, "sums", self.nnz() > 0);
            interruptible([&] { self.gradient(of_out, from, samples, workers, to); });
          },
          py::arg("left"), py::arg("right"), py::arg("batch"), py::arg("threads"), py::arg("sums"));
}

}  // namespace

void bind_convolution(py::module_& m) {
  bind<float>(m, "SparseConvolutionF32");
  bind<double>(m, "SparseConvolutionF64");
}
