// Which instruction set runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace llmloss::cpu {

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return has_isa(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return has_isa(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case Isa::neon:
      return true;
#endif
    default:
      return false;
  }
}

Isa detected_isa() {
  static const Isa best = [] {
    Isa found = Isa::portable;
    for (const Isa isa : all_isas) {
      if (has_isa(isa)) found = isa;
    }
    return found;
  }();
  return best;
}

Isa active_isa() {
  const char* asked = std::getenv("LLMLOSS_CPU_ISA");
  if (asked == nullptr) return detected_isa();
  std::string names;
  for (const Isa isa : all_isas) {
    if (name_of(isa) == asked) return has_isa(isa) ? isa : detected_isa();
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::invalid_argument("LLMLOSS_CPU_ISA must be one of " + names + ", got " + asked);
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
#elif defined(__aarch64__)
namespace neon {
template <typename T>
const Kernels<T>& kernels_of();
}
#endif

template <typename T>
const Kernels<T>& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kernels_of<T>();
    case Isa::avx512:
      return avx512::kernels_of<T>();
    case Isa::avx512_bf16:
      return avx512_bf16::kernels_of<T>();
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::kernels_of<T>();
#endif
    default:
      return portable::kernels_of<T>();
  }
}

template const Kernels<float>& kernels(Isa);
template const Kernels<double>& kernels(Isa);
template const Kernels<BFloat16>& kernels(Isa);
template const Kernels<Half>& kernels(Isa);

}  // namespace llmloss::cpu
