// The storage types of logits, and the arithmetic type of each.
//
// BFloat16 and Half are plain 16-bit words, so that the same kernel source compiles for the host,
// for nvcc and for the emulator. Conversions round to nearest even and keep nan and inf.
#pragma once

#include <cstdint>

#include "macros.h"
#include "math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace llmloss {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The arithmetic type of a storage type: float, except double for double.
template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename T>
using real_t = typename RealOf<T>::type;

LLMLOSS_HD float to_real(float x) { return x; }
LLMLOSS_HD double to_real(double x) { return x; }

LLMLOSS_HD float to_real(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

LLMLOSS_HD float to_real(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf and nan: widen the exponent
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Reinterpreted as a float, the value is too small by a factor of 2^(127 - 15), the difference of
  // the exponent biases. The multiplication also turns subnormal halves into normal floats.
  const float widened = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(widened));
#endif
}

LLMLOSS_HD void from_real(float x, float& out) { out = x; }
LLMLOSS_HD void from_real(double x, double& out) { out = x; }

LLMLOSS_HD void from_real(float x, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? uint16_t{0x7fc0} : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

LLMLOSS_HD void from_real(float x, Half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 aligns the half's last place with the float's, so that the float
    // addition rounds correctly.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = uint16_t(sign | half);
#endif
}

}  // namespace llmloss
