#include "solve.cuh"
#include "launch.cuh"

namespace sparseflow::cuda {
namespace {

using Kernel = void (*)(SolveParams<double>);
Kernel kernel_of(Instance instance) {
  return instance.shared ? solve_kernel<double, 1, true> : solve_kernel<double, 1, false>;
}

}  // namespace

template <>
int launch_solve(const SolveParams<double>& params, Instance instance, const Launch& launch) {
  return launch_kernel(kernel_of(instance), params, params.plan.threads, params.plan.shared_bytes, launch);
}
template <>
int solve_occupancy<double>(Instance instance, int device, int threads, int shared_bytes, int& blocks) {
  return occupancy_of(kernel_of(instance), device, threads, shared_bytes, blocks);
}

}  // namespace sparseflow::cuda
