// Starts a kernel: on a device, or in the emulator.
#pragma once

#include "../device/simt.cuh"

namespace llmloss::cuda {

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

#if defined(LLMLOSS_SIMT)

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Shape& shape, void*,
           const Arguments&... arguments) {
  if (shape.blocks == 0) return 0;
  simt::launch(kernel, simt::Grid{unsigned(shape.blocks)}, unsigned(shape.threads),
               unsigned(shape.cluster), size_t(shape.shared_bytes), arguments...);
  return 0;
}

#else

// Returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Shape& shape, void* stream,
           const Arguments&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const auto allow = [&](cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
  };
  constexpr int always_allowed = 48 << 10, portable_cluster = 8;
  if (shape.shared_bytes > always_allowed) {
    const cudaError_t error =
        allow(cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  if (shape.cluster > portable_cluster) {
    const cudaError_t error = allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif

}  // namespace llmloss::cuda
