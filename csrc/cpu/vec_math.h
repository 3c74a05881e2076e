// exp and tanh of SIMD vectors, to about one unit in the last place.
#pragma once

#include "../core/logit_transform.h"

namespace llmloss::cpu::LLMLOSS_ISA {

// Constants of exp. Reduction: x = n log 2 + r.
template <typename Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // Adding it leaves round(x) + 127, the biased exponent of 2^round(x), in the low bits.
  static constexpr float round_and_bias = 12582912.0f + 127.0f;
  static constexpr float lowest = -88.0f;  // from here down the result is 0
};

template <>
struct ExpConstants<double> {
  static constexpr double round_and_bias = 6755399441055744.0 + 1023.0;
  static constexpr double lowest = -709.0;
};

template <typename Real>
using Reg = typename Vec<Real>::Reg;

// x - n log 2. The float nearest to log 2 is 1.9e-9 from it, so that one fused operation leaves a
// relative error of |n| 1.9e-9 in e^x: half a unit in the last place down to e^-21, and 4 at e^-88,
// too small to matter in a sum or a gradient. Doubles need log 2 in two parts.
inline Reg<float> reduce(Reg<float> x, Reg<float> n) {
  return Vec<float>::fma(n, Vec<float>::broadcast(-0.693147180559945309417f), x);
}

inline Reg<double> reduce(Reg<double> x, Reg<double> n) {
  using V = Vec<double>;
  const Reg<double> r = V::fma(n, V::broadcast(-6.93145751953125e-1), x);
  return V::fma(n, V::broadcast(-1.42860682030941723212e-6), r);
}

// e^r for |r| <= log(2) / 2. The polynomial of degree 6 with the smallest relative error, 3e-9,
// among those that begin with 1 + r (fitted by Lawson's algorithm).
inline Reg<float> exp_reduced(Reg<float> r) {
  using V = Vec<float>;
  Reg<float> p = V::broadcast(1.3814539880e-3f);
  p = V::fma(p, r, V::broadcast(8.3687451271e-3f));
  p = V::fma(p, r, V::broadcast(4.1668390790e-2f));
  p = V::fma(p, r, V::broadcast(1.6666520399e-1f));
  p = V::fma(p, r, V::broadcast(4.9999993432e-1f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::fma(p, r, V::broadcast(1.0f));
}

// S. Moshier, Cephes Math Library (exp.c).
inline Reg<double> exp_reduced(Reg<double> r) {
  using V = Vec<double>;
  const Reg<double> square = r * r;
  Reg<double> p = V::broadcast(1.26177193074810590878e-4);
  p = V::fma(p, square, V::broadcast(3.02994407707441961300e-2));
  p = V::fma(p, square, V::broadcast(9.99999999999999999910e-1)) * r;
  Reg<double> q = V::broadcast(3.00198505138664455042e-6);
  q = V::fma(q, square, V::broadcast(2.52448340349684104192e-3));
  q = V::fma(q, square, V::broadcast(2.27265548208155028766e-1));
  q = V::fma(q, square, V::broadcast(2.0));
  return V::fma(V::broadcast(2.0), V::div(p, q - p), V::broadcast(1.0));
}

// e^x for x <= 0, or x above 0 by a rounding error; nan stays nan.
template <typename Real>
inline Reg<Real> exp_nonpositive(Reg<Real> x) {
  using V = Vec<Real>;
  using C = ExpConstants<Real>;
  x = V::max(V::broadcast(C::lowest), x);
  const Real log2_e = Real(1.44269504088896340736);
  const Reg<Real> biased = V::fma(x, V::broadcast(log2_e), V::broadcast(C::round_and_bias));
  const Reg<Real> n = biased - V::broadcast(C::round_and_bias);
  return exp_reduced(reduce(x, n)) * V::exponent_from_low_bits(biased);
}

// (tanh x) / x - 1 for |x| < 0.625, over x^2. Cephes tanhf.c, tanh.c.
inline Reg<float> tanh_small(Reg<float> square) {
  using V = Vec<float>;
  Reg<float> p = V::broadcast(-5.70498872745e-3f);
  p = V::fma(p, square, V::broadcast(2.06390887954e-2f));
  p = V::fma(p, square, V::broadcast(-5.37397155531e-2f));
  p = V::fma(p, square, V::broadcast(1.33314422036e-1f));
  p = V::fma(p, square, V::broadcast(-3.33332819422e-1f));
  return p * square;
}

inline Reg<double> tanh_small(Reg<double> square) {
  using V = Vec<double>;
  Reg<double> p = V::broadcast(-9.64399179425052238628e-1);
  p = V::fma(p, square, V::broadcast(-9.92877231001918586564e1));
  p = V::fma(p, square, V::broadcast(-1.61468768441708447952e3));
  Reg<double> q = square + V::broadcast(1.12811678491632931402e2);
  q = V::fma(q, square, V::broadcast(2.23548839060100448583e3));
  q = V::fma(q, square, V::broadcast(4.84406305325125486048e3));
  return V::div(p * square, q);
}

template <typename Real>
inline Reg<Real> tanh_of(Reg<Real> x) {
  using V = Vec<Real>;
  const Reg<Real> zero = V::broadcast(Real(0)), one = V::broadcast(Real(1));
  const Reg<Real> magnitude = V::abs(x);
  const Reg<Real> small = V::fma(x, tanh_small(x * x), x);
  const Reg<Real> bound = V::broadcast(Real(0.625));
  // Most logits are well inside their cap: those need neither an exponential nor a division.
  if (V::count_greater(bound, magnitude) == V::width) return small;
  const Reg<Real> e = exp_nonpositive<Real>(magnitude * V::broadcast(Real(-2)));
  const Reg<Real> large = V::div(one - e, one + e);
  const Reg<Real> with_sign = V::select_less(x, zero, zero - large, large);
  return V::select_less(magnitude, bound, small, with_sign);
}

// LogitTransform::apply of a vector.
template <typename Real>
inline Reg<Real> transform_logits(const LogitTransform<Real>& transform, Reg<Real> z) {
  using V = Vec<Real>;
  if (!(transform.cap > 0)) return z * V::broadcast(transform.scale);
  const Reg<Real> u = z * V::broadcast(transform.scale / transform.cap);
  return V::broadcast(transform.cap) * tanh_of<Real>(u);
}

}  // namespace llmloss::cpu::LLMLOSS_ISA
