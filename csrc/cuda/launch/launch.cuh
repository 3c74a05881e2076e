// Turns plans into launches; included by the files that instantiate the kernels.
#pragma once

#include "../kernels/fused.cuh"
#include "../kernels/merge_shards.cuh"
#include "../kernels/reduce.cuh"
#include "../kernels/row_grad.cuh"
#include "../kernels/row_stats.cuh"
#include "../kernels/scale.cuh"
#include "launch.h"
#include "launcher.cuh"

namespace llmloss::cuda {

static_assert(tile_bytes == tile_columns<float> * int64_t{sizeof(float)});
static_assert(block_size == max_warps_per_block * int{warp_size});
static_assert(sizeof(GradRow<double>) <= coefficient_bytes);
static_assert(fused_block_size<false> == most_fused_warps * int{warp_size});
static_assert(fused_block_size<true> == most_holding_warps * int{warp_size});

// What is compiled: one kernel for each of these sums of tasks, the cheapest first.
using StatsTasks =
    TaskList<task::plain, task::mean, task::mean | task::entropy,
             task::mean | task::entropy | task::order, task::transformed,
             task::transformed | task::mean,
             task::transformed | task::mean | task::entropy | task::order, task::everything>;
using GradTasks = TaskList<task::plain, task::transformed, task::entropy, task::everything>;

template <typename T>
struct StatsKernels {
  template <unsigned tasks>
  static auto of() {
    return &row_stats_kernel<T, tasks>;
  }
};

template <typename T>
struct GradKernels {
  template <unsigned tasks>
  static auto of() {
    return &row_grad_kernel<T, tasks>;
  }
};

// Whether every row begins at a multiple of 16 bytes.
template <typename T>
bool rows_are_aligned(const T* data, const RowLayout& layout) {
  const auto is_whole = [](int64_t elements) {
    return elements * int64_t{sizeof(T)} % vector_bytes == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % vector_bytes == 0 && is_whole(layout.outer_stride) &&
         is_whole(layout.inner_stride);
}

inline RowShare share_of(const SharePlan& plan) {
  return {plan.warps_per_row, plan.blocks_per_row};
}

inline Chunks chunks_of(const ChunkPlan& plan) { return {plan.columns, plan.count}; }

template <typename T>
int RowKernels<T>::row_stats(const RowInputs<T>& in, const RowOutputs<Real>& out,
                             const StatsPlan& plan, void* workspace, void* stream) {
  auto* states = plan.workspace_bytes > 0 ? static_cast<PartialState<Real>*>(workspace) : nullptr;
  const auto kernel = StatsTasks::first_with<StatsKernels<T>>(task::of_statistics(in, out));
  const int error = launch(kernel, {plan.share.blocks, plan.share.threads, plan.shared_bytes},
                           stream, in, out, states, chunks_of(plan.chunks), share_of(plan.share));
  if (error != 0 || states == nullptr) return error;
  return launch(merge_rows_kernel<T>, {ceil_div(in.rows, max_warps_per_block), block_size}, stream,
                in, out, states, chunks_of(plan.chunks));
}

template <typename T>
int RowKernels<T>::row_grad(const RowInputs<T>& in, const SavedStats<Real>& saved,
                            const GradSource<Real>& source, const GradOutputs<T>& out,
                            const GradPlan& plan, void* stream) {
  const unsigned needed = task::of_gradient(in, source, out.grad_scale != nullptr);
  const auto kernel = GradTasks::first_with<GradKernels<T>>(needed);
  return launch(kernel, {plan.share.blocks, plan.share.threads, plan.shared_bytes}, stream, in,
                saved, source, out, share_of(plan.share));
}

template <typename T>
bool RowKernels<T>::can_fuse(const RowInputs<T>& in, const RowOutputs<Real>& out,
                             const GradSource<Real>& source, const GradOutputs<T>& grad) {
  const bool with_scale = grad.grad_scale != nullptr;
  return (task::of_statistics(in, out) | task::of_gradient(in, source, with_scale)) == task::plain;
}

template <typename T>
FusedPlan RowKernels<T>::plan_fused(const RowInputs<T>& in, const GradOutputs<T>& grad,
                                    const DeviceLimits& device) {
  const bool is_aligned =
      rows_are_aligned(in.logits, in.layout) && rows_are_aligned<T>(grad.grad, grad.layout);
  return cuda::plan_fused(in.rows, in.vocab_size, sizeof(T), state_bytes,
                          is_aligned && fused_can_hold<T>, device);
}

template <typename T>
int RowKernels<T>::fused(const RowInputs<T>& in, const RowOutputs<Real>& out,
                         const GradSource<Real>& source, const GradOutputs<T>& grad,
                         const FusedPlan& plan, void* stream) {
  auto kernel = &fused_kernel<T, false>;
  if constexpr (fused_can_hold<T>) {
    if (plan.holds) kernel = &fused_kernel<T, true>;
  }
  return launch(kernel, {plan.blocks, plan.threads, plan.shared_bytes, plan.cluster, true}, stream,
                in, out, source, grad, chunks_of(plan.chunks), plan.slice_chunks,
                plan.staged_chunks);
}

template <typename T>
int RowKernels<T>::scale(T* data, const RowLayout& layout, int64_t rows, int64_t columns,
                         const Real* factor, const SharePlan& plan, void* stream) {
  return launch(scale_kernel<T>, {plan.blocks, plan.threads}, stream, data, layout, rows, columns,
                factor, share_of(plan));
}

// A sum over the rows takes one block.
inline constexpr int sum_threads = 1024;
inline constexpr Shape sum_shape{1, sum_threads, sum_threads / 32 * int64_t{sizeof(double)}};

template <typename Real>
int LossKernels<Real>::reduce_loss(const LossRows<Real>& rows, Reduction reduction, Real* loss,
                                   void* stream) {
  const Shape shape = reduction == Reduction::none
                          ? Shape{ceil_div(rows.rows, sum_threads), sum_threads}
                          : sum_shape;
  return launch(reduce_loss_kernel<Real>, shape, stream, rows, reduction, loss);
}

template <typename Real>
int LossKernels<Real>::denominator(const LossRows<Real>& rows, Real* denominator, void* stream) {
  return launch(denominator_kernel<Real>, sum_shape, stream, rows, denominator);
}

template <typename Real>
int LossKernels<Real>::mean_loss(const LossRows<Real>& rows, Real* denominator, Real* loss,
                                 void* stream) {
  return launch(mean_loss_kernel<Real>, sum_shape, stream, rows, denominator, loss);
}

template <typename Real>
int LossKernels<Real>::sum(const Real* values, int64_t count, Real* sum, void* stream) {
  return launch(sum_kernel<Real>, sum_shape, stream, values, count, sum);
}

template <typename Real>
int LossKernels<Real>::merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out,
                                    Real* owners, void* stream) {
  return launch(merge_shards_kernel<Real>, {ceil_div(in.rows, merge_threads), merge_threads},
                stream, in, out, owners);
}

}  // namespace llmloss::cuda
