// The kernels as functions of the host. Every one returns cudaSuccess (0) or an error's number; say() puts it into words.
#pragma once

#include <string>
#include <vector>

#include "adjoint.h"
#include "solve.h"

namespace sparseflow::cuda {

// Which instance of a kernel: samples per thread (4 or 1; 1 in double), workspace in shared memory or not.
struct Instance {
  int per_thread = 1;
  bool shared = true;
};

struct Launch {
  int device = 0;
  int blocks = 1;
  void* stream = nullptr;
  bool cooperative = false;  // all blocks at once, or an error
};

// Percent of a multiprocessor's shared memory that its share of the blocks takes: what is left of it is first-level cache.
// The device keeps 1 KB of every block for itself.
inline int carveout(int blocks, int multiprocessors, int shared_bytes, int shared_per_multiprocessor) {
  const long long here = (blocks + multiprocessors - 1) / multiprocessors, wanted = here * (shared_bytes + 1024LL);
  const long long percent = (100 * wanted + shared_per_multiprocessor - 1) / shared_per_multiprocessor;
  return percent < 100 ? int(percent) : 100;
}

template <class T>
int launch_solve(const SolveParams<T>& params, Instance instance, const Launch& launch);
template <class T>
int launch_adjoint(const AdjointParams<T>& params, Instance instance, const Launch& launch);

// Blocks of a kernel that a multiprocessor takes at once.
template <class T>
int solve_occupancy(Instance instance, int device, int threads, int shared_bytes, int& blocks);
template <class T>
int adjoint_occupancy(Instance instance, int device, int threads, int shared_bytes, int& blocks);

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0, multiprocessors = 0, shared_per_block = 0, shared_per_multiprocessor = 0, threads_per_multiprocessor = 0;
  long long memory = 0;
};
struct Probe {
  int runtime = 0, driver = 0, code = 0;
  std::string error;
  std::vector<DeviceInfo> devices;
};
Probe probe();
std::string say(int code);
bool context_is_lost(int code);  // nothing will work on the device until the process is started anew

}  // namespace sparseflow::cuda
