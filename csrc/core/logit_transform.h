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

  LLMLOSS_HD TransformKind kind() const {
    if (cap > 0) return TransformKind::softcap;
    return scale == Real(1) && scale_at == nullptr ? TransformKind::identity : TransformKind::scale;
  }

  // Reads the scale from device memory once, so that the kernel's loops need not.
  LLMLOSS_HD LogitTransform resolved() const {
    return scale_at == nullptr ? *this : LogitTransform{*scale_at, cap, nullptr};
  }

  LLMLOSS_HD Real apply(Real z) const {
    const Real scaled = scale * z;
    return cap > 0 ? cap * tanh_of(scaled / cap) : scaled;
  }

  LLMLOSS_HD TransformedLogit<Real> with_derivatives(Real z) const {
    const Real scaled = scale * z;
    if (!(cap > 0)) return {scaled, scale, z};
    const Real tanh = tanh_of(scaled / cap);
    const Real slope = Real(1) - tanh * tanh;
    // At +-inf the cap is flat: the derivative is 0, not 0 * inf.
    return {cap * tanh, scale * slope, slope == Real(0) ? Real(0) : z * slope};
  }
};

}  // namespace llmloss
