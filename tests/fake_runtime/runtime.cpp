// A CUDA run-time library without a device: it prints each call, and whether a stream that is being
// captured would bear it. FAKE_ERROR is what every question about the device is answered with.
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int relaxed = 2;  // of cudaStreamCaptureMode
int mode = 0;               // global, as torch captures

int error() {
  const char* asked = std::getenv("FAKE_ERROR");
  return asked == nullptr ? 0 : std::atoi(asked);
}

// Calls that may load a kernel, for which memory is allocated.
int loads(const char* name) {
  std::printf("%s: %s\n", name, mode == relaxed ? "allowed" : "breaks a capture");
  return 0;
}

int numbers(int attribute) {
  switch (attribute) {
    case 16:
      return 132;  // multiprocessors
    case 97:
      return 227 << 10;  // shared memory of a block
    case 81:
      return 228 << 10;  // of a multiprocessor
    case 75:
      return 9;  // compute capability
    case 76:
      return 3;
    case 120:
      return 1;  // has clusters
    default:
      return 0;
  }
}

}  // namespace

extern "C" {
int cudaThreadExchangeStreamCaptureMode(int* with) {
  const int before = mode;
  mode = *with;
  *with = before;
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = numbers(attribute);
  return error();
}
int cudaFuncSetAttribute(const void*, int, int) { return loads("cudaFuncSetAttribute"); }
int cudaOccupancyMaxActiveClusters(int* clusters, const void*, const void*) {
  *clusters = 1;
  return loads("cudaOccupancyMaxActiveClusters");
}
int cudaLaunchKernelExC(const void*, const void*, void**) { return loads("cudaLaunchKernelExC"); }
int cudaGetLastError() { return 0; }
int cudaDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}
const char* cudaGetErrorString(int error) {
  static char meaning[32];
  std::snprintf(meaning, sizeof meaning, "(meaning %d)", error);
  return meaning;
}

// What the code that nvcc adds refers to; it differs between toolkits.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*) {}
char __cudaInitModule(void**) { return 0; }
int __cudaPopCallConfiguration(void*, void*, void*, void*) { return 1; }
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaLaunchKernel(void*, ...) { return 1; }
int cudaLaunchKernel(const void*, ...) { return 1; }
}
