// A program laid out for a GPU: its image, and where in it the numbers lie that a training step changes.
#pragma once

#include <vector>

#include "../validate.h"
#include "device_program.h"

namespace sparseflow::cuda {

template <class T>
struct Image {
  DeviceProgram program;  // all but the image's address
  std::vector<char> bytes;

  // New numbers go into the image, seen as an array of T: image[place[i]] = numbers[entry[i]].
  struct Places {
    std::vector<int64_t> place;
    std::vector<int64_t> entry;
  };
  std::vector<Places> matrices;  // of the values; of a gated one the path constants
  struct ModulationPlaces {
    int64_t n = 0, bias = -1, gate_slope = -1, gate_offset = -1, shift_slope = -1, shift_offset = -1;
  };
  std::vector<ModulationPlaces> modulations;
  std::vector<int64_t> vectors;  // where the numbers of a row vector begin

  // Where a block leaves gradients, among its sums: first number and how many; -1: none. The last sum is that of t.
  struct Range {
    int64_t first = -1, size = 0;
  };
  std::vector<Range> matrix_gradients, bias_gradients, vector_gradients;
  struct GateRanges {
    Range gate_slope, gate_offset, shift_slope, shift_offset;
  };
  std::vector<GateRanges> time_gradients;  // by modulation

  // What a cost estimate asks for, by operation of the body, or of keep and reverse together.
  struct Work {
    double rows = 0, cols = 0, quads = 0, lanes = 1;  // lanes: 2 with a tangent
    bool dense = false, gradient = false;
    double instructions = 0;  // of a pointwise operation
  };
  std::vector<Work> work;
  std::vector<char> dense;  // by matrix: whether its rows go by fours
};

// chunk_bytes: the most one chunk of a stream may take (a single row may take more). dense_above: the density from which
// all columns of a matrix are stored, four rows at a time. Throws std::invalid_argument for what
// `validate` refuses, for functions of time that live outside or in another program, and for layers wider than 65535.
template <class T>
Image<T> make_image(const Program<T>& program, size_t chunk_bytes, double dense_above);

}  // namespace sparseflow::cuda
