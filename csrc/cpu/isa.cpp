// Which instruction set runs.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace llmloss::cpu {

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) {
      return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
    return avx2 ? Isa::avx2 : Isa::portable;
  }();
  return isa;
#else
  return Isa::portable;
#endif
}

Isa active_isa() {
  const char* asked = std::getenv("LLMLOSS_CPU_ISA");
  if (asked == nullptr) return detected_isa();
  const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  for (int i = 0; i < int(std::size(names)); ++i) {
    if (std::strcmp(asked, names[i]) == 0) return std::min(Isa(i), detected_isa());
  }
  throw std::invalid_argument(std::string("LLMLOSS_CPU_ISA must be portable, avx2, avx512 or ") +
                              "avx512_bf16, got " + asked);
}

namespace portable {
template <typename T>
const Kernels<T>& kernels_of();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const Kernels<T>& kernels_of();
}
namespace avx512 {
template <typename T>
const Kernels<T>& kernels_of();
}
namespace avx512_bf16 {
template <typename T>
const Kernels<T>& kernels_of();
}
#endif

template <typename T>
const Kernels<T>& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512_bf16) return avx512_bf16::kernels_of<T>();
  if (isa == Isa::avx512) return avx512::kernels_of<T>();
  if (isa == Isa::avx2) return avx2::kernels_of<T>();
#else
  (void)isa;
#endif
  return portable::kernels_of<T>();
}

template const Kernels<float>& kernels(Isa);
template const Kernels<double>& kernels(Isa);
template const Kernels<BFloat16>& kernels(Isa);
template const Kernels<Half>& kernels(Isa);

}  // namespace llmloss::cpu
