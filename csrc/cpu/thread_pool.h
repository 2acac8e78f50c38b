// Workers that take numbered pieces of work. One pool per process, grown on demand; results never depend on who did what.
#pragma once

#include <functional>

namespace sparseflow {

// Calls body(index, worker) for every index in [0, count), on up to `threads` threads (the caller is worker 0), and
// returns when all are done. The first exception of a body is rethrown. Nested calls run on the caller alone.
void parallel_for(int count, int threads, const std::function<void(int index, int worker)>& body);

}  // namespace sparseflow
