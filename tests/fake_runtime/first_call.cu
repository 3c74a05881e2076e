// What our code asks of CUDA's run-time library when a kernel is launched for the first time, and
// what it says of errors. Linked with runtime.cpp in that library's place: no device is needed.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/launch/launch.h"
#include "cuda/launch/launcher.cuh"

using namespace llmloss::cuda;

__global__ void some_kernel(int) {}

int main(int count, char** words) {
  if (count == 3 && std::strcmp(words[1], "error") == 0) {
    std::printf("%s\n", error_message(std::atoi(words[2])).c_str());
    return 0;
  }
  DeviceLimits limits{};
  int error = device_limits(0, limits);
  std::printf("limits: error %d, %d multiprocessors, clusters of %d\n", error,
              limits.multiprocessors, limits.max_cluster);
  if (error != 0) return 0;
  // Every kind of launch that there is: small, with much shared memory, in clusters.
  const Shape shapes[] = {{4, 128}, {4, 640, 200 << 10, 1, true}, {16, 256, 100 << 10, 16, true}};
  for (const Shape& shape : shapes) {
    error = launch(some_kernel, shape, nullptr, 7);
    std::printf("launch: error %d\n", error);
  }
  std::printf("by itself: ");
  cudaFuncSetAttribute(some_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}
