// Scalar functions with the same overloads on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "macros.h"

namespace llmloss {

template <typename To, typename From>
LLMLOSS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename Real>
LLMLOSS_HD constexpr Real infinity() {
  return std::numeric_limits<Real>::infinity();
}

LLMLOSS_HD float exp_of(float x) { return ::expf(x); }
LLMLOSS_HD double exp_of(double x) { return ::exp(x); }
LLMLOSS_HD float expm1_of(float x) { return ::expm1f(x); }
LLMLOSS_HD double expm1_of(double x) { return ::expm1(x); }
LLMLOSS_HD float log_of(float x) { return ::logf(x); }
LLMLOSS_HD double log_of(double x) { return ::log(x); }
LLMLOSS_HD float log1p_of(float x) { return ::log1pf(x); }
LLMLOSS_HD double log1p_of(double x) { return ::log1p(x); }
LLMLOSS_HD float tanh_of(float x) { return ::tanhf(x); }
LLMLOSS_HD double tanh_of(double x) { return ::tanh(x); }

// a b + c with one rounding, explicitly: whether a compiler fuses depends on the surrounding code.
LLMLOSS_HD float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }
LLMLOSS_HD double fma_of(double a, double b, double c) { return ::fma(a, b, c); }

// The smallest number above x; a nan above infinity, which no number is above either.
LLMLOSS_HD float next_above(float x) {
  const auto bits = bit_cast<int32_t>(x);
  return bit_cast<float>(x == 0 ? 1 : bits + (bits < 0 ? -1 : 1));
}
LLMLOSS_HD double next_above(double x) {
  const auto bits = bit_cast<int64_t>(x);
  return bit_cast<double>(x == 0 ? int64_t{1} : bits + (bits < 0 ? -1 : 1));
}

// The larger of two numbers; b if either is nan.
template <typename Real>
LLMLOSS_HD Real max_of(Real a, Real b) {
  return a > b ? a : b;
}

}  // namespace llmloss
