// Which instruction sets this processor and its operating system run.
#pragma once

namespace sparseflow {

// The names of the kernels' instruction sets, best first: "avx512", "avx2", "baseline".
const char* best_isa();
bool runs_avx2();
bool runs_avx512();

}  // namespace sparseflow
