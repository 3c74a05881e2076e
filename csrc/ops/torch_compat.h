// Where the stable ABI of torch 2.11 and that of 2.13 differ: the only place that knows.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

// A number, since 2.11 has no name for it.
#define LLMLOSS_TORCH_2_13 (TORCH_FEATURE_VERSION >= 0x020d000000000000ULL)

// 2.13 passes the message on.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define LLMLOSS_TORCH_CHECK(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define LLMLOSS_TORCH_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#if LLMLOSS_CUDA && !LLMLOSS_TORCH_2_13
// In libtorch_cuda.so. Weak, so that the library also loads where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace llmloss::ops {

#if LLMLOSS_CUDA
// The current stream of a device, as a cudaStream_t.
inline void* current_cuda_stream(int32_t device) {
#if LLMLOSS_TORCH_2_13
  return torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "llmloss: built against a torch without CUDA; build it again with this torch");
  void* stream = nullptr;
  LLMLOSS_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
#endif
}
#endif

}  // namespace llmloss::ops
