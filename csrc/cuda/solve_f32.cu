#include "solve.cuh"
#include "launch.cuh"

namespace sparseflow::cuda {
namespace {

using Kernel = void (*)(SolveParams<float>);
Kernel kernel_of(Instance instance) {
  if (instance.per_thread == 4) return instance.shared ? solve_kernel<float, 4, true> : solve_kernel<float, 4, false>;
  return instance.shared ? solve_kernel<float, 1, true> : nullptr;
}

}  // namespace

template <>
int launch_solve(const SolveParams<float>& params, Instance instance, const Launch& launch) {
  return launch_kernel(kernel_of(instance), params, params.plan.threads, params.plan.shared_bytes, launch);
}
template <>
int solve_occupancy<float>(Instance instance, int device, int threads, int shared_bytes, int& blocks) {
  return occupancy_of(kernel_of(instance), device, threads, shared_bytes, blocks);
}

}  // namespace sparseflow::cuda
