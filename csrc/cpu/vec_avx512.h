// SIMD vectors of AVX-512 (F, BW, DQ, VL), and its BF16 conversion with LLMLOSS_AVX512_BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../core/dtypes.h"

namespace llmloss::cpu::LLMLOSS_ISA {

template <typename Real>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int width = 16;
  using Reg = __m512;

  static Reg broadcast(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static Reg load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
  }
  static void store(Half* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  // b where either is nan.
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg zero_where_zero(Reg test, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
  }
  static Reg select_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), then);
  }
  static int count_greater(Reg a, Reg b) {
    return __builtin_popcount(unsigned(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)));
  }
  static bool any_equal(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0; }
  // Shifts the low bits of t into the exponent: see exp_nonpositive.
  static Reg exponent_from_low_bits(Reg t) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
  }

 private:
#if defined(LLMLOSS_AVX512_BF16)
  // Rounds to nearest even; nan stays nan; below 1.2e-38 the instruction gives 0.
  static __m256i to_bfloat16(Reg v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#else
  // Rounds to nearest even; nan stays nan.
  static __m256i to_bfloat16(Reg v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_srli_epi32(
        _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000)), 16);
    return _mm512_cvtepi32_epi16(words);
  }
#endif
};

template <>
struct Vec<double> {
  static constexpr int width = 8;
  using Reg = __m512d;

  static Reg broadcast(double x) { return _mm512_set1_pd(x); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg abs(Reg a) { return _mm512_abs_pd(a); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg zero_where_zero(Reg test, Reg v) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(test, _mm512_setzero_pd(), _CMP_NEQ_UQ), v);
  }
  static Reg select_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return _mm512_mask_mov_pd(otherwise, _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), then);
  }
  static int count_greater(Reg a, Reg b) {
    return __builtin_popcount(unsigned(_mm512_cmp_pd_mask(a, b, _CMP_GT_OQ)));
  }
  static bool any_equal(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ) != 0; }
  static Reg exponent_from_low_bits(Reg t) {
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t), 52));
  }
};

}  // namespace llmloss::cpu::LLMLOSS_ISA
