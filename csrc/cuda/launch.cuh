// Launching a kernel of one parameter block, with CUDA or on the host.
#pragma once

#include <mutex>

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

// Errors of these calls are taken out of the runtime's memory, so that the next call starts clean.
inline int cleared(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return int(code);
}

// The device that was current before is so again afterwards: it is the caller's.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    code = cleared(cudaGetDevice(&before_));
    if (code == 0 && before_ != device) code = cleared(cudaSetDevice(device)), changed_ = code == 0;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int code = 0;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A kernel's attributes are the process's: nobody else changes them between here and the launch that they are for.
inline std::mutex& attributes_mutex() {
  static std::mutex mutex;
  return mutex;
}

// As much shared memory to a block as there is, and of the multiprocessor what `blocks` take; 0: all of it.
template <class P>
int allow_shared(void (*kernel)(P), int device, int blocks, int shared_bytes) {
  int most = 0, multiprocessors = 0, together = 0;
  if (const int code = cleared(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))) return code;
  if (const int code = cleared(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))) return code;
  if (const int code = cleared(cudaDeviceGetAttribute(&together, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))) return code;
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (const int code = cleared(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most))) return code;
  const int percent = blocks == 0 ? int(cudaSharedmemCarveoutMaxShared) : carveout(blocks, multiprocessors, shared_bytes, together);
  return cleared(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, percent));
}

template <class P>
int launch_kernel(void (*kernel)(P), const P& params, int threads, int shared_bytes, const Launch& launch) {
  static_assert(sizeof(P) <= 4096, "kernel parameters are limited to 4 KB");
  const OnDevice on(launch.device);
  if (on.code) return on.code;
  const std::lock_guard<std::mutex> alone(attributes_mutex());
  if (const int code = allow_shared(kernel, launch.device, launch.blocks, shared_bytes)) return code;
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
  const OnDevice on(device);
  if (on.code) return on.code;
  const std::lock_guard<std::mutex> alone(attributes_mutex());
  if (const int code = allow_shared(kernel, device, 0, shared_bytes)) return code;
  return cleared(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, size_t(shared_bytes)));
}

#endif

}  // namespace sparseflow::cuda
