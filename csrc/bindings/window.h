// A convolution's window as Python gives it: source, target, kernel, stride, padding and dilation, (height, width) each.
#pragma once

#include "../field.h"
#include "arguments.h"

namespace sparseflow {



inline Window window_of(const py::tuple& pairs) {
  Window w;
  int* const to[] = {w.source, w.target, w.kernel, w.stride, w.padding, w.dilation};
  if (pairs.size() != 6) refuse("window", "six pairs of numbers", pairs);
  for (int i = 0; i < 6; ++i) {
    const py::sequence pair = pairs[i].cast<py::sequence>();
    if (pair.size() != 2) refuse("window", "six pairs of numbers", pairs);
    for (int axis = 0; axis < 2; ++axis) to[i][axis] = static_cast<int>(whole(pair[axis], "window", -(1 << 20), 1 << 20));
  }
  return w;
}

}  // namespace sparseflow
