// Where the buffers of a program lie in a tile's workspace.
#pragma once

#include "../validate.h"

namespace sparseflow::cuda {

// Rows of S numbers for every buffer. Buffers that are never needed at the same time share rows: a tile's activations must
// fit into shared memory.
template <class T>
std::vector<int32_t> place_buffers(const Program<T>& program, int32_t& rows);

}  // namespace sparseflow::cuda
