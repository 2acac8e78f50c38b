// What Python gives, as C++ takes it: numbers that are what they are meant to be, or a ValueError that names the argument;
// and calls that Ctrl-C ends.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../calls.h"

namespace sparseflow {

namespace py = pybind11;

[[noreturn]] inline void refuse(const std::string& name, const std::string& wanted, py::handle found) {
  throw std::invalid_argument(name + " must be " + wanted + ", not " + py::repr(found).cast<std::string>());
}

inline int64_t whole(py::handle value, const char* name, int64_t low, int64_t high) {
  const std::string wanted = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
  if (!PyIndex_Check(value.ptr())) refuse(name, wanted, value);
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || found < low || found > high) refuse(name, wanted, value);
  return found;
}

inline double real(py::handle value, const char* name, double low, double high) {
  const double found = PyFloat_AsDouble(value.ptr());
  const bool failed = found == -1.0 && PyErr_Occurred() != nullptr;
  if (failed) PyErr_Clear();
  if (failed || !(found >= low && found <= high)) {
    char bounds[80];
    std::snprintf(bounds, sizeof bounds, "a number from %g to %g", low, high);
    refuse(name, bounds, value);
  }
  return found;
}

// Samples are counted in 32 bits, tile by tile.
inline constexpr int kMostSamples = INT_MAX - 4096;
inline int batch_of(py::handle value) { return static_cast<int>(whole(value, "batch", 0, kMostSamples)); }
inline int threads_of(py::handle value) { return static_cast<int>(whole(value, "threads", 1, INT_MAX)); }

inline int sign_of(py::handle value) {
  const int sign = static_cast<int>(whole(value, "sign", -1, 1));
  if (sign == 0) refuse("sign", "1 or -1", value);
  return sign;
}

// The address of memory; 0, which is none, where that is allowed.
template <class T>
T* address(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}
template <class T>
T* address(uintptr_t p, const char* name, bool needed = true) {
  if ((p == 0 && needed) || p % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " must be the address of memory of its type, not " + std::to_string(p));
  return reinterpret_cast<T*>(p);
}

// Indices, from any array of whole numbers.
inline std::vector<int32_t> indices(const py::array& values, const char* name) {
  const char kind = values.dtype().kind();
  if (kind != 'i' && kind != 'u' && values.size() > 0)
    throw std::invalid_argument(std::string(name) + " must hold whole numbers, not " + py::str(values.dtype()).cast<std::string>());
  if (values.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis, not " + std::to_string(values.ndim()));
  if (kind == 'u' && values.itemsize() == 8) {
    const auto wide = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>(values);
    for (py::ssize_t i = 0; i < wide.size(); ++i)
      if (wide.data()[i] > uint64_t(INT32_MAX)) throw std::invalid_argument(std::string(name) + " must hold 32-bit numbers, not " + std::to_string(wide.data()[i]));
  }
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(values);
  std::vector<int32_t> out(size_t(wide.size()));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t one = wide.data()[i];
    if (one < INT32_MIN || one > INT32_MAX) throw std::invalid_argument(std::string(name) + " must hold 32-bit numbers, not " + std::to_string(one));
    out[size_t(i)] = static_cast<int32_t>(one);
  }
  return out;
}

// work() without the interpreter; Ctrl-C, and whatever else a signal handler raises, ends it within a fraction of a second.
template <class Work>
auto interruptible(Work work) {
  const py::gil_scoped_release release;
  Interruption interruption([] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
  return interruption.during(std::move(work));
}

}  // namespace sparseflow
