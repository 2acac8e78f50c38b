// Between the user's memory, [batch][columns], and a tile's rows, [columns][width].
#pragma once

#include <cstddef>

#include "../calls.h"

namespace sparseflow {

// Batch-major rows of the user to the batch-minor rows of a tile. Lanes beyond the batch repeat the last sample, so that
// they never meet values the batch does not contain.
template <class T>
void load_tile(const T* source, int columns, int first, int count, int width, T* rows) {
  for (int c = 0; c < columns; ++c) {
    T* row = rows + size_t(c) * width;
    for (int s = 0; s < count; ++s) row[s] = source[size_t(first + s) * columns + c];
    for (int s = count; s < width; ++s) row[s] = row[count - 1];
  }
  worked(int64_t(columns) * width);
}

template <class T>
void store_tile(const T* rows, int columns, int first, int count, int width, T* target) {
  for (int s = 0; s < count; ++s)
    for (int c = 0; c < columns; ++c) target[size_t(first + s) * columns + c] = rows[size_t(c) * width + s];
  worked(int64_t(columns) * width);
}

}  // namespace sparseflow
