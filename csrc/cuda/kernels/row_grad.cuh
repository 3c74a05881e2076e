// The gradient of every loss over the row statistics.
#pragma once

#include "gradient.cuh"
#include "row_stats.cuh"

namespace llmloss::cuda {

// Reads each row once and writes its gradient, over the logits or to other memory: 2 x rows x
// columns x sizeof(T) bytes of traffic, half of that for a row without a gradient. Shared memory:
// the coefficients of a block's rows, then the sums of its warps.
template <typename T, unsigned tasks>
__global__ void __launch_bounds__(block_size, grad_blocks<T>(tasks))
    row_grad_kernel(const __grid_constant__ RowInputs<T> in,
                    const __grid_constant__ SavedStats<real_t<T>> saved,
                    const __grid_constant__ GradSource<real_t<T>> source,
                    const __grid_constant__ GradOutputs<T> out, const RowShare share) {
  using Real = real_t<T>;
  const int64_t row = share.row();
  if (row >= in.rows) return;
  const int thread = share.thread();
  const int threads = share.threads();
  T* const grad = out.grad + out.layout.offset(row);
  const RowTarget read_target(in.targets, row);
  const auto upstream = source.read(row);
  if (!read_target.is_active(in.vocab_size) || source.vanishes(upstream)) {
    write_zeros(grad, 0, int(in.columns), thread, threads);
    if (out.grad_scale != nullptr && thread == 0) out.grad_scale[row] = 0;
    return;
  }
  // One warp computes what is the same for the row.
  GradRow<Real>* const shared = simt::dynamic_shared<GradRow<Real>>();
  GradRow<Real>* const of_row = shared + (share.is_warp() ? simt::warp_index() : 0);
  if (share.is_warp() || simt::warp_index() == 0) {
    const Real target_weight = target_class(in, read_target).weight;
    const GradRow<Real> computed = grad_row(in, source, upstream, saved.of_row(row), target_weight);
    if (simt::lane() == 0) *of_row = computed;
  }
  if (share.is_warp()) {
    simt::warp_sync();
  } else {
    simt::block_sync();
  }
  LogitTransform<Real> transform;
  if constexpr (task::has(tasks, task::transformed)) transform = in.transform.resolved();
  const int target = read_target.is_here() ? int(read_target.value()) : -1;
  const ColumnGradient<T, tasks> gradient{in, transform, row, target, out.grad_scale != nullptr};
  const double sum =
      gradient.write(*of_row, logits_of(in, row), grad, 0, int(in.vocab_size), share.part());
  write_zeros(grad, int(in.vocab_size), int(in.columns), thread, threads);
  if (!task::has(tasks, task::rest) || out.grad_scale == nullptr) return;

  double total = warp_sum(sum);
  if (!share.is_warp()) {
    double* const sums = reinterpret_cast<double*>(shared + 1);
    if (simt::lane() == 0) sums[simt::warp_index()] = total;
    simt::block_sync();
    total = 0;
    for (int w = 0; w < share.warps_per_row; ++w) total += sums[w];
  }
  if (thread == 0) out.grad_scale[row] = Real(total);
}

}  // namespace llmloss::cuda
