// What every native engine asks of a program before it looks at a number of it, and matrices as they are walked.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "field.h"

namespace sparseflow {

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

// Checks that every index of the program is in range; throws std::invalid_argument naming what is not. Nothing that
// fails here ever reaches a kernel.
template <class T>
void validate(const Program<T>& program);

// A matrix, or its transpose, as it is walked: entry[k] is where the value of the k-th lies in the matrix.
struct Entries {
  int rows, cols;
  std::vector<int32_t> row_ptr, col, entry;
  int nnz() const { return static_cast<int>(col.size()); }
};

template <class T>
Entries entries_of(const Matrix<T>& matrix, bool transposed);

}  // namespace sparseflow
