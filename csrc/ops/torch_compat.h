// What is asked of torch by name while running, since the stable ABI that the operators are
// compiled for (abi.py) lacks it, or not every torch has it: the only place that knows. It comes
// before torch's own headers, whose inline functions shall use its macro.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// The message of the last exception, of libtorch_cpu.so since 2.13. Weak, so that the library also
// loads where torch lacks it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace llmloss::ops {

// Says which call of torch's C interface failed, and why, where torch tells it.
[[noreturn]] inline void throw_torch_error(const char* call, const char* file, int line) {
  std::string message;
  if (torch_exception_get_what_without_backtrace != nullptr) {
    message = std::string(torch_exception_get_what_without_backtrace()) + " (originally from ";
  }
  message += std::string(call) + " API call failed at " + file + ", line " + std::to_string(line);
  if (torch_exception_get_what_without_backtrace != nullptr) message += ")";
  throw std::runtime_error(message);
}

// The current stream of a device, as a cudaStream_t (cuda_stream.cpp).
void* current_cuda_stream(int32_t device);

}  // namespace llmloss::ops

// Braces, since torch uses it without a semicolon, too.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                              \
  if ((call) != TORCH_SUCCESS) {                                  \
    ::llmloss::ops::throw_torch_error(#call, __FILE__, __LINE__); \
  }
