#include "launch.cuh"

namespace sparseflow::cuda {

#if defined(SPARSEFLOW_HOST_SHIM)

Probe probe() {
  Probe out;
  out.runtime = out.driver = 13000;
  out.devices.push_back({"the host, thread by thread", 9, 0, 3, 232448, 233472, 2048, 1LL << 34});
  return out;
}
std::string say(int) { return ""; }
bool context_is_lost(int) { return false; }

#else

Probe probe() {
  Probe out;
  cudaRuntimeGetVersion(&out.runtime);
  cudaDriverGetVersion(&out.driver);  // 0 without a driver
  int count = 0;
  out.code = cleared(cudaGetDeviceCount(&count));
  if (out.code != 0) {
    out.error = say(out.code);
    return out;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (const int code = cleared(cudaGetDeviceProperties(&properties, i))) {
      out.code = code;
      out.error = say(code);
      return out;
    }
    out.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount, int(properties.sharedMemPerBlockOptin),
                           int(properties.sharedMemPerMultiprocessor), properties.maxThreadsPerMultiProcessor, (long long)(properties.totalGlobalMem)});
  }
  return out;
}

std::string say(int code) {
  const cudaError_t error = cudaError_t(code);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

bool context_is_lost(int code) {
  switch (cudaError_t(code)) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

#endif

}  // namespace sparseflow::cuda
