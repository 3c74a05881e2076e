// The CUDA kernels as functions of raw pointers. Each starts its work on a stream (a cudaStream_t)
// without waiting, and returns a cudaError_t, 0 for success. No CUDA header is needed to call them.
#pragma once

#include <cstdint>
#include <string>

#include "../../core/loss_rows.h"
#include "../../core/row_stats.h"
#include "../../core/shards.h"
#include "plan.h"

namespace llmloss::cuda {

template <typename T>
struct RowKernels {
  using Real = real_t<T>;
  static constexpr int64_t state_bytes = sizeof(PartialState<Real>);

  // workspace: plan.workspace_bytes of device memory.
  static int row_stats(const RowInputs<T>& in, const RowOutputs<Real>& out, const StatsPlan& plan,
                       void* workspace, void* stream);
  static int row_grad(const RowInputs<T>& in, const SavedStats<Real>& saved,
                      const GradSource<Real>& source, const GradOutputs<T>& out,
                      const GradPlan& plan, void* stream);
  // Whether the fused kernel does all that is needed.
  static bool can_fuse(const RowInputs<T>& in, const RowOutputs<Real>& out,
                       const GradSource<Real>& source, const GradOutputs<T>& grad);
  static FusedPlan plan_fused(const RowInputs<T>& in, const GradOutputs<T>& grad,
                              const DeviceLimits& device);
  static int fused(const RowInputs<T>& in, const RowOutputs<Real>& out,
                   const GradSource<Real>& source, const GradOutputs<T>& grad,
                   const FusedPlan& plan, void* stream);
  static int scale(T* data, const RowLayout& layout, int64_t rows, int64_t columns,
                   const Real* factor, const SharePlan& plan, void* stream);
};

template <typename Real>
struct LossKernels {
  static int reduce_loss(const LossRows<Real>& rows, Reduction reduction, Real* loss, void* stream);
  static int denominator(const LossRows<Real>& rows, Real* denominator, void* stream);
  // Both at once.
  static int mean_loss(const LossRows<Real>& rows, Real* denominator, Real* loss, void* stream);
  static int sum(const Real* values, int64_t count, Real* sum, void* stream);
  static int merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out, Real* owners,
                          void* stream);
};

// The limits of the current device, whose index is `device`. Returns a cudaError_t.
int device_limits(int device, DeviceLimits& limits);

// What a cudaError_t means, and what to do about it where that is known.
std::string error_message(int error);

}  // namespace llmloss::cuda
