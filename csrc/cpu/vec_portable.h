// SIMD vectors for any processor that GCC's or Clang's vector extensions support (SSE2, NEON ...).
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/dtypes.h"

namespace llmloss::cpu::LLMLOSS_ISA {

template <typename Real>
struct Vec;

template <typename Real, typename Int>
struct VecBase {
  static constexpr int width = 16 / sizeof(Real);
  typedef Real Reg __attribute__((vector_size(16)));
  typedef Int Bits __attribute__((vector_size(16)));

  static Reg broadcast(Real x) { return Reg{} + x; }
  template <typename T>
  static Reg load(const T* p) {
    Reg r;
    for (int i = 0; i < width; ++i) r[i] = to_real(p[i]);
    return r;
  }
  template <typename T>
  static void store(T* p, Reg v) {
    for (int i = 0; i < width; ++i) from_real(Real(v[i]), p[i]);
  }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg abs(Reg a) { return a < 0 ? -a : a; }
  static Reg div(Reg a, Reg b) { return a / b; }
  // b where either is nan.
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg zero_where_zero(Reg test, Reg v) { return test == 0 ? Reg{} : v; }
  static Reg select_less(Reg a, Reg b, Reg then, Reg otherwise) { return a < b ? then : otherwise; }
  static int count_greater(Reg a, Reg b) {
    const Bits mask = a > b;
    int count = 0;
    for (int i = 0; i < width; ++i) count -= int(mask[i]);
    return count;
  }
  static bool any_equal(Reg a, Reg b) {
    const Bits mask = a == b;
    Int any = 0;
    for (int i = 0; i < width; ++i) any |= mask[i];
    return any != 0;
  }
  // Shifts the low bits of t into the exponent: see exp_nonpositive.
  static Reg exponent_from_low_bits(Reg t) {
    return reinterpret_cast<Reg>(reinterpret_cast<Bits>(t) << (sizeof(Real) == 4 ? 23 : 52));
  }
};

template <>
struct Vec<float> : VecBase<float, int32_t> {};
template <>
struct Vec<double> : VecBase<double, int64_t> {};

}  // namespace llmloss::cpu::LLMLOSS_ISA
