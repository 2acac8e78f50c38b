// Launching a kernel of one parameter block, with CUDA or on the host.
#pragma once

#include "launch.h"
#include "platform.h"

namespace sparseflow::cuda {

#if defined(SPARSEFLOW_HOST_SHIM)

template <class P>
int launch_kernel(void (*kernel)(P), const P& params, int threads, int shared_bytes, const Launch& launch) {
  shim::Launch options;
  options.cooperative = launch.cooperative;
  shim::launch(kernel, P(params), launch.blocks, threads, size_t(shared_bytes), options);
  return 0;
}
template <class P>
int occupancy_of(void (*)(P), int, int, int, int& blocks) {
  blocks = 1;
  return 0;
}

#else

template <class P>
int allow_shared(void (*kernel)(P), int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return 0;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

// Errors of these calls are taken out of the runtime's memory, so that the next call starts clean.
inline int cleared(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return int(code);
}

template <class P>
int launch_kernel(void (*kernel)(P), const P& params, int threads, int shared_bytes, const Launch& launch) {
  static_assert(sizeof(P) <= 4096, "kernel parameters are limited to 4 KB");
  if (const int code = cleared(cudaSetDevice(launch.device))) return code;
  if (const int code = cleared(cudaError_t(allow_shared(kernel, shared_bytes)))) return code;
  P copy = params;
  void* arguments[] = {&copy};
  const dim3 grid(launch.blocks), block(threads);
  cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (launch.cooperative) return cleared(cudaLaunchCooperativeKernel(function, grid, block, arguments, size_t(shared_bytes), stream));
  return cleared(cudaLaunchKernel(function, grid, block, arguments, size_t(shared_bytes), stream));
}
template <class P>
int occupancy_of(void (*kernel)(P), int device, int threads, int shared_bytes, int& blocks) {
  if (const int code = cleared(cudaSetDevice(device))) return code;
  if (const int code = cleared(cudaError_t(allow_shared(kernel, shared_bytes)))) return code;
  return cleared(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, size_t(shared_bytes)));
}

#endif

}  // namespace sparseflow::cuda
