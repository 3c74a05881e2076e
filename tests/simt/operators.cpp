// The operators of csrc/ops/cuda_ops.cpp for CPU tensors: what they launch runs in the emulator,
// and is told by name. For tests/test_launches.py.
#include "ops/torch_compat.h"  // before torch's

#include <cxxabi.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <string>

#include "cuda/launch/launch.cuh"
#include "ops/library.h"

#define LLMLOSS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string launched;  // a line for each kernel

// Of the device that is emulated, an H100.
constexpr llmloss::cuda::DeviceLimits device{132, 227 << 10, 228 << 10, 16};

void tell(const void* kernel) {
  Dl_info info{};
  dladdr(kernel, &info);
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  launched += std::string(name == nullptr ? "?" : name) + "\n";
  std::free(name);
}

}  // namespace

LLMLOSS_EXPORT void llmloss_forget_launches() {
  launched.clear();
  llmloss::simt::emulator::settings().on_launch = tell;
}
LLMLOSS_EXPORT const char* llmloss_launches() { return launched.c_str(); }

// Of torch, which has no device here. The linker prefers these (-Bsymbolic).
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

namespace llmloss::cuda {

int device_limits(int, DeviceLimits& limits) {
  limits = device;
  return 0;
}
std::string error_message(int) { return "none"; }

template struct RowKernels<float>;
template struct RowKernels<double>;
template struct RowKernels<BFloat16>;
template struct RowKernels<Half>;
template struct LossKernels<float>;
template struct LossKernels<double>;

}  // namespace llmloss::cuda

namespace llmloss::ops {

void register_cpu(Library& m) { register_cuda(m); }
void register_cpu_isa(Library&) {}
void* current_cuda_stream(int32_t) { return nullptr; }

}  // namespace llmloss::ops
