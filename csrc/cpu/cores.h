// How many cores this process may use.
#pragma once

namespace sparseflow {

// The cores that the calling thread may be scheduled on, or fewer where the process's control group (of a container, say)
// has a quota of processor time that amounts to fewer. At least 1.
int usable_cores();

}  // namespace sparseflow
