// The shapes in which a kernel can be launched, which of them fit, and which is expected to be the quickest.
#pragma once

#include <string>
#include <vector>

#include "image.h"

namespace sparseflow::cuda {

// A shape on offer: S samples to a tile, how many of them a thread takes, parts of a row, threads of a block.
struct Shape {
  int tile, per_thread, parts, threads;
};
extern const Shape kShapes[];
extern const int kShapeCount;

struct Device {
  int multiprocessors = 132;
  int shared_per_block = 232448;           // with the opt-in
  int shared_per_multiprocessor = 233472;
  int threads_per_multiprocessor = 2048;
};

struct Plan {
  Shape shape;
  BlockPlan block;
  bool work_in_shared = true;
  int blocks_per_multiprocessor = 1;  // as far as memory and threads allow; the driver has the last word
  int tiles = 0, blocks = 0;
  double cycles = 0;  // expected, of one evaluation of the whole batch; only good for comparing
  std::string reason;
};

inline constexpr size_t kUncut = size_t(1) << 30;  // streams that stay in shared memory are not cut
inline constexpr size_t kChunkBytes = 16384;       // those that pass through it are

// How this shape would run; `fits` is false, and the reason says why, where it cannot.
template <class T>
Plan plan_for(const Image<T>& image, const Shape& shape, const Device& device, int batch, int stages, bool adjoint, bool per_tile, bool& fits);

// All shapes that fit, the one expected to be the quickest first. per_sample: tiles of one sample.
template <class T>
std::vector<Plan> plans(const Image<T>& image, const Device& device, int batch, int stages, bool adjoint, bool per_tile, bool per_sample);

}  // namespace sparseflow::cuda
