// The current stream of a CUDA device.
#include "torch_compat.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace llmloss::ops {

void* current_cuda_stream(int32_t device) {
  // Of torch's CUDA library, to which nothing is linked: one build loads with and without it.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "llmloss: torch's libtorch_cuda.so does not tell its stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace llmloss::ops
