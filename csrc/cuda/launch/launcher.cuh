// Starts a kernel, on a device or in the emulator.
#pragma once

#include "../device/simt.cuh"

namespace llmloss::cuda {

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool prefers_shared = false;  // over L1, which shares its memory
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

// While it lives, this thread may load kernels and ask for their properties although a stream is
// being captured: none of that is work for the stream, but the run-time library may allocate memory
// for a kernel's code on its first use, which a capture forbids otherwise.
class AllowedInCapture {
 public:
  AllowedInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AllowedInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowedInCapture(const AllowedInCapture&) = delete;
  AllowedInCapture& operator=(const AllowedInCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Shape& shape, void* stream,
           const Arguments&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  const AllowedInCapture allowed;
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
    // Allow the device's maximum, whatever this launch needs: the setting belongs to the kernel,
    // not to the launch, and another thread's launch may need more.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) error = allow(cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  if (shape.prefers_shared) {
    const cudaError_t error =
        allow(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  if (shape.cluster > portable_cluster) {
    const cudaError_t error = allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The number of clusters of that shape that the current device can run at once. Returns a
// cudaError_t.
template <typename... Parameters>
int active_clusters(void (*kernel)(Parameters...), const Shape& shape, int& count) {
  const AllowedInCapture allowed;
  const auto* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t errors[] = {
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(shape.shared_bytes)),
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)};
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.cluster));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&count, function, &config);
}

#endif

}  // namespace llmloss::cuda
