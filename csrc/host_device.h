// Functions that run on the host and, where nvcc compiles them, on a GPU.
#pragma once

#if defined(__CUDACC__)
#define SF_HD __host__ __device__ __forceinline__
#else
#define SF_HD inline
#endif
