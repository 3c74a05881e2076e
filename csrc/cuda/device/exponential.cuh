// e^(x - reference), for many x and one reference.
#pragma once

#include "../../core/dtypes.h"
#include "../../core/math.h"
#include "simt.cuh"

namespace llmloss::cuda {

// For 16-bit logits: 2^(x unit - scaled), a product and a sum in one instruction, and the
// hardware's own power of two. `scaled`, the reference times the unit, is rounded; what it lacks is
// the same for every x, so that sums are multiplied by `correction` once. float is as accurate as
// torch.
template <typename T>
class ExpFrom {
 public:
  using Real = real_t<T>;

  __device__ __forceinline__ explicit ExpFrom(Real reference) : scaled_(reference) {
    if constexpr (is_fast) {
      // Beyond 2^24, where `scaled` could lack more than 1, and soon more than a power of two can
      // make up for, 16-bit logits are so far apart that e^x is 1 or 0, and so is 2^x.
      const bool is_far = !(::fabsf(reference) < 0x1p24f);
      unit_ = is_far ? Real(1) : log2_e;
      inverse_unit_ = is_far ? Real(1) : ln_2;
      scaled_ = reference * unit_;
      lacking_ = fma_of(reference, unit_, -scaled_);
    }
  }

  // The exponent of a column, in units of our own.
  __device__ __forceinline__ Real exponent(Real x) const {
    if constexpr (is_fast) return fma_of(x, unit_, -scaled_);
    return x - scaled_;
  }

  // e^(x - reference) of its exponent, without the correction.
  static __device__ __forceinline__ Real exp(Real exponent) {
    if constexpr (is_fast) return simt::fast_exp2(exponent);
    return exp_of(exponent);
  }
  __device__ __forceinline__ Real correction() const {
    if constexpr (is_fast) return simt::fast_exp2(-lacking_);
    return Real(1);
  }

  // The sum of w (x - reference), from the sums of w times the exponent and of w.
  __device__ __forceinline__ Real natural(Real weighted, Real weights) const {
    if constexpr (!is_fast) return weighted;
    return fma_of(-lacking_, weights, weighted) * inverse_unit_;
  }

  // e^x of a single number.
  static __device__ __forceinline__ Real exp_once(Real x) {
    if constexpr (is_fast) return simt::fast_exp2(x * log2_e);
    return exp_of(x);
  }

 private:
  static constexpr bool is_fast = sizeof(T) == 2;
  static constexpr Real log2_e = Real(1.4426950408889634), ln_2 = Real(0.6931471805599453);

  Real unit_ = 1, inverse_unit_ = 1, scaled_, lacking_ = 0;
};

}  // namespace llmloss::cuda
