// SIMD vectors of AArch64, whose every processor has NEON with FMA and half-precision conversions.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "../core/dtypes.h"

namespace llmloss::cpu::LLMLOSS_ISA {

template <typename Real>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int width = 4;
  using Reg = float32x4_t;

  static Reg broadcast(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
  }
  static Reg load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static void store(float* p, Reg v) { vst1q_f32(p, v); }
  static void store(BFloat16* p, Reg v) { vst1_u16(&p->bits, to_bfloat16(v)); }
  static void store(Half* p, Reg v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg abs(Reg a) { return vabsq_f32(a); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  // b where either is nan, unlike vmaxq_f32.
  static Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Reg zero_where_zero(Reg test, Reg v) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vceqzq_f32(test)));
  }
  static Reg select_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return vbslq_f32(vcltq_f32(a, b), then, otherwise);
  }
  static int count_greater(Reg a, Reg b) {
    return -vaddvq_s32(vreinterpretq_s32_u32(vcgtq_f32(a, b)));
  }
  static bool any_equal(Reg a, Reg b) { return vmaxvq_u32(vceqq_f32(a, b)) != 0; }
  // Shifts the low bits of t into the exponent: see exp_nonpositive.
  static Reg exponent_from_low_bits(Reg t) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t), 23));
  }

 private:
  // Rounds to nearest even; nan stays nan.
  static uint16x4_t to_bfloat16(Reg v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
  }
};

template <>
struct Vec<double> {
  static constexpr int width = 2;
  using Reg = float64x2_t;

  static Reg broadcast(double x) { return vdupq_n_f64(x); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static void store(double* p, Reg v) { vst1q_f64(p, v); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static Reg abs(Reg a) { return vabsq_f64(a); }
  static Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static Reg zero_where_zero(Reg test, Reg v) {
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(v), vceqzq_f64(test)));
  }
  static Reg select_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return vbslq_f64(vcltq_f64(a, b), then, otherwise);
  }
  static int count_greater(Reg a, Reg b) {
    return -int(vaddvq_s64(vreinterpretq_s64_u64(vcgtq_f64(a, b))));
  }
  static bool any_equal(Reg a, Reg b) {
    const uint64x2_t equal = vceqq_f64(a, b);
    return (vgetq_lane_u64(equal, 0) | vgetq_lane_u64(equal, 1)) != 0;
  }
  static Reg exponent_from_low_bits(Reg t) {
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(t), 52));
  }
};

}  // namespace llmloss::cpu::LLMLOSS_ISA
