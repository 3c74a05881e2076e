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

// Whether the kernels that are compiled for the common case apply.
template <typename T>
bool is_plain(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out) {
  const Wanted wanted = Wanted::by(out);
  return in.transform.kind() == TransformKind::identity && !wanted.more_sums() &&
         !wanted.floats[Stat::mean_log_prob] && !wanted.order();
}

template <typename T>
bool is_plain(const RowInputs<T>& in, const GradSource<real_t<T>>& source,
              const GradOutputs<T>& out) {
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    if (Stat::needs_more_sums(stat) && source.has(stat)) return false;
  }
  return in.transform.kind() == TransformKind::identity && out.grad_scale == nullptr &&
         (in.weights.is_constant() || !source.has(Stat::mean_log_prob));
}

// The fused kernel that is plain in the same halves as the separate kernels would be, so that the
// bits are the same.
template <typename T, bool staged>
auto fused_of(bool plain_stats, bool plain_grad) {
  if (plain_stats && plain_grad) return fused_kernel<T, true, true, staged>;
  return plain_grad ? fused_kernel<T, false, true, staged> : fused_kernel<T, false, false, staged>;
}

inline RowShare share_of(const SharePlan& plan) {
  return {plan.warps_per_row, plan.blocks_per_row};
}

inline Chunks chunks_of(const ChunkPlan& plan) { return {plan.columns, plan.count}; }

template <typename T>
int RowKernels<T>::row_stats(const RowInputs<T>& in, const RowOutputs<Real>& out,
                             const StatsPlan& plan, void* workspace, void* stream) {
  auto* states = plan.workspace_bytes > 0 ? static_cast<PartialState<Real>*>(workspace) : nullptr;
  const auto kernel = is_plain(in, out) ? row_stats_kernel<T, true> : row_stats_kernel<T, false>;
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
  const auto kernel =
      is_plain(in, source, out) ? row_grad_kernel<T, true> : row_grad_kernel<T, false>;
  return launch(kernel, {plan.share.blocks, plan.share.threads, plan.shared_bytes}, stream, in,
                saved, source, out, share_of(plan.share));
}

template <typename T>
int RowKernels<T>::fused(const RowInputs<T>& in, const RowOutputs<Real>& out,
                         const GradSource<Real>& source, const GradOutputs<T>& grad,
                         const FusedPlan& plan, void* stream) {
  const auto kernel = plan.is_staged
                          ? fused_of<T, true>(is_plain(in, out), is_plain(in, source, grad))
                          : fused_of<T, false>(is_plain(in, out), is_plain(in, source, grad));
  return launch(kernel, {plan.blocks, plan.threads, plan.shared_bytes, plan.cluster, true}, stream,
                in, out, source, grad, chunks_of(plan.chunks), plan.slice_chunks);
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
