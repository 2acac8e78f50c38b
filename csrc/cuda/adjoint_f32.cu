#include "adjoint.cuh"
#include "launch.cuh"

namespace sparseflow::cuda {
namespace {

using Kernel = void (*)(AdjointParams<float>);
Kernel kernel_of(Instance instance) {
  return instance.shared ? adjoint_kernel<float, 4, true> : adjoint_kernel<float, 4, false>;
}

}  // namespace

template <>
int launch_adjoint(const AdjointParams<float>& params, Instance instance, const Launch& launch) {
  return launch_kernel(kernel_of(instance), params, params.plan.threads, params.plan.shared_bytes, launch);
}
template <>
int adjoint_occupancy<float>(Instance instance, int device, int threads, int shared_bytes, int& blocks) {
  return occupancy_of(kernel_of(instance), device, threads, shared_bytes, blocks);
}

}  // namespace sparseflow::cuda
