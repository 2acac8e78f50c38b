// Loops over numbered pieces of work, shared with helpers where that pays. Results never depend on who did what.
//
// A loop is over when its pieces are done, not when its helpers have said so: helpers take pieces while there are any, and
// one that wakes up too late finds none. How many are asked follows from the work of the loop, which is measured.
#pragma once

#include <atomic>

namespace sparseflow {

// Seconds that a unit of work takes on one thread: learned whenever it is done with more than one thread allowed.
class Cost {
 public:
  bool known() const { return seconds() >= 0; }
  double seconds() const { return seconds_.load(std::memory_order_relaxed); }
  void learn(double seconds);

 private:
  std::atomic<double> seconds_{-1.0};
};

// What one piece of a loop comes to: so many units of a work whose cost is learned.
struct Work {
  Cost& cost;
  double units;
};

// Calls body(index, worker) for every index in [0, count), on at most `threads` threads (the caller is worker 0) and no
// more than the process may use cores, and returns when all are done. The first exception of a body is rethrown. Nested
// calls run on the caller alone, as does a second thread of the user's while the first one has the helpers.
using LoopBody = void (*)(const void* context, int index, int worker);
void parallel_for(int count, int threads, const Work& each, LoopBody body, const void* context);

template <class Body>
void parallel_for(int count, int threads, const Work& each, const Body& body) {
  parallel_for(count, threads, each, [](const void* context, int index, int worker) { (*static_cast<const Body*>(context))(index, worker); },
               &body);
}

// Loops of `seconds` on one thread each are to come, `total` seconds in all (0: not known): the number of threads that they
// would get now.
int threads_at_hand(double seconds, double total, int threads);

// Wakes helpers for loops that are to come, `total` seconds of work on one thread, if that pays.
void expect_work(double total, int threads);

// From now on every loop goes to all the threads it allows, however small it is and however busy the machine, and helpers
// are awake before it begins. For tests.
void force_threads(bool on);

}  // namespace sparseflow
