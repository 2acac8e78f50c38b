// What every native engine asks of a program before it looks at a number of it, and matrices as they are walked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "field.h"

namespace sparseflow {

// What byte offsets of 32 bits allow, for the widest tile (384 bytes to a row) and the largest step of a stream (16 bytes to
// an entry, a few of them to fill up).
inline constexpr int64_t kMostRows = (int64_t(1) << 31) / 512;  // of all buffers, one more each, times their slots
inline constexpr int64_t kMostEntries = (int64_t(1) << 28) - (int64_t(1) << 25);  // of a matrix, or paths

// What the memory of an expression allows: a pointer to each place and each row vector is made for every run.
inline constexpr int kMostPlaces = 1024;
inline constexpr int kMostRowVectors = 64;

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument("program: " + what); }

// Checks that every index of the program is in range; throws std::invalid_argument naming what is not. Nothing that
// fails here ever reaches a kernel.
template <class T>
void validate(const Program<T>& program);

// Parts of it (validate_pointwise.cpp).
template <class T>
void validate_expressions(const Program<T>& program);
template <class T>
void validate_pointwise(const Op& op, const Program<T>& program, const std::string& name);

// A matrix, or its transpose, as it is walked: entry[k] is where the value of the k-th lies in the matrix.
struct Entries {
  int rows, cols;
  std::vector<int32_t> row_ptr, col, entry;
  int nnz() const { return static_cast<int>(col.size()); }
};

template <class T>
Entries entries_of(const Matrix<T>& matrix, bool transposed);

}  // namespace sparseflow
