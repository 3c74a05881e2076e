// The limits of this process's devices.
#include <cuda_runtime.h>

#include "launch.h"
#include "launcher.cuh"

namespace llmloss::cuda {
namespace {

// The largest cluster that the current device can run. A partition of a device, or a device with
// disabled units, may lack the adjacent multiprocessors for its architecture's maximum.
__global__ void __launch_bounds__(32 * max_warps_per_block) cluster_probe_kernel() {}

// As the run-time library counts: 13010 is 13.1.
std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

int largest_cluster(int promised, int64_t shared_bytes) {
  for (int cluster = promised; cluster > 1; cluster /= 2) {
    int count = 0;
    const Shape shape{cluster, 32 * max_warps_per_block, shared_bytes, cluster};
    if (active_clusters(cluster_probe_kernel, shape, count) == cudaSuccess && count > 0)
      return cluster;
    cudaGetLastError();  // clears the error, which later calls would report
  }
  return 1;
}

}  // namespace

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
  // Data-centre GPUs support clusters of sixteen blocks, others of eight.
  const int promised = !has_clusters ? 1 : major == 9 || major == 10 ? 16 : 8;
  limits.max_cluster = largest_cluster(promised, shared_per_block);
  return cudaSuccess;
}

std::string error_message(int error) {
  const std::string meaning = cudaGetErrorString(cudaError_t(error));
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorUnsupportedPtxVersion: {
      int driver = 0;
      const bool is_known = cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
      return meaning + ". This build of llmloss_ext needs a driver for CUDA " +
             version(CUDART_VERSION) +
             (is_known ? ", and this one is for " + version(driver) : std::string()) +
             ": update the driver, or build llmloss_ext with an older CUDA toolkit (CUDA_HOME)";
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      int device = 0, major = 0, minor = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      const std::string capability = std::to_string(major) + std::to_string(minor);
      return meaning + ". This build of llmloss_ext has no code for this GPU: build it with " +
             "LLMLOSS_CUDA_ARCHS=" + capability + " (compute capability 8.0 or later)";
    }
    default:
      return meaning;
  }
}

}  // namespace llmloss::cuda
