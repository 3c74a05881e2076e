// Transforms raw logits z into the logits x that the loss uses: x = cap tanh(scale z / cap).
#pragma once

#include "macros.h"
#include "math.h"

namespace llmloss {

enum class TransformKind { identity, scale, softcap };

// x, dx/dz and dx/dscale of one logit.
template <typename Real>
struct TransformedLogit {
  Real x;
  Real dx_dz;
  Real dx_dscale;
};

template <typename Real>
struct LogitTransform {
  Real scale = 1;
  Real cap = 0;                    // 0: no softcap
  const Real* scale_at = nullptr;  // a learnable scale in device memory; replaces `scale`
  Real scale_per_cap = 0;          // known once it is resolved

  LLMLOSS_HD TransformKind kind() const {
    if (cap > 0) return TransformKind::softcap;
    return scale == Real(1) && scale_at == nullptr ? TransformKind::identity : TransformKind::scale;
  }

  // Reads the scale from device memory, and divides, once, so that the kernels' loops need not.
  LLMLOSS_HD LogitTransform resolved() const {
    const Real known = scale_at == nullptr ? scale : *scale_at;
    return {known, cap, nullptr, cap > 0 ? known / cap : Real(0)};
  }

  // Of a resolved transform, as all that follows. `tanh` may be a faster one than tanh_of.
  template <typename Tanh>
  LLMLOSS_HD Real apply(Real z, const Tanh& tanh) const {
    return cap > 0 ? capped(z, tanh) : scale * z;
  }
  template <typename Tanh>
  LLMLOSS_HD Real capped(Real z, const Tanh& tanh) const {
    return cap * tanh(scale_per_cap * z);
  }

  template <typename Tanh>
  LLMLOSS_HD TransformedLogit<Real> with_derivatives(Real z, const Tanh& tanh) const {
    return cap > 0 ? capped_with_derivatives(z, tanh) : scaled_with_derivatives(z);
  }
  LLMLOSS_HD TransformedLogit<Real> scaled_with_derivatives(Real z) const {
    return {scale * z, scale, z};
  }
  template <typename Tanh>
  LLMLOSS_HD TransformedLogit<Real> capped_with_derivatives(Real z, const Tanh& tanh) const {
    const Real t = tanh(scale_per_cap * z);
    const Real slope = fma_of(-t, t, Real(1));
    // At +-inf the cap is flat: the derivative is 0, not 0 * inf.
    return {cap * t, scale * slope, slope == Real(0) ? Real(0) : z * slope};
  }
};

}  // namespace llmloss
