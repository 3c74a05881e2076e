// What this process's devices are like.
#include <cuda_runtime.h>

#include "launch.h"

namespace llmloss::cuda {

int device_limits(int device, DeviceLimits& limits) {
  int shared_per_block = 0, shared_per_multiprocessor = 0, has_clusters = 0, major = 0;
  const auto get = [device](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, device);
  };
  const cudaError_t errors[] = {
      get(limits.multiprocessors, cudaDevAttrMultiProcessorCount),
      get(shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      get(shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      get(has_clusters, cudaDevAttrClusterLaunch),
      get(major, cudaDevAttrComputeCapabilityMajor),
  };
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  limits.shared_per_block = shared_per_block;
  limits.shared_per_multiprocessor = shared_per_multiprocessor;
  // Sixteen blocks on the data centre's chips; others promise eight.
  limits.max_cluster = !has_clusters ? 1 : major == 9 || major == 10 ? 16 : 8;
  return cudaSuccess;
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace llmloss::cuda
