// The gradient of every loss over the row statistics.
#pragma once

#include "gradient.cuh"
#include "row_stats.cuh"

namespace llmloss::cuda {

// Reads each row once and writes its gradient, over the logits or to other memory: 2 x rows x
// columns x sizeof(T) bytes of traffic, half of that for a row without a gradient.
template <typename T, bool plain>
__global__ void __launch_bounds__(block_size, planned_blocks<T, plain>)
    row_grad_kernel(const __grid_constant__ RowInputs<T> in,
                    const __grid_constant__ SavedStats<real_t<T>> saved,
                    const __grid_constant__ GradSource<real_t<T>> source,
                    const __grid_constant__ GradOutputs<T> out, const RowShare share) {
  using Real = real_t<T>;
  const int64_t row = share.row();
  if (row >= in.rows) return;
  const int thread = share.thread();
  const int threads = share.threads();
  T* grad = out.grad + out.layout.offset(row);
  if (!has_gradient(in, source, row)) {
    write_zeros(grad, 0, int(in.columns), thread, threads);
    if (out.grad_scale != nullptr && thread == 0) out.grad_scale[row] = 0;
    return;
  }
  const LogitTransform<Real> transform = in.transform.resolved();
  const Target<Real> target = target_class(in, row);
  const ColumnGradient<T, plain> gradient{
      in,
      transform,
      row,
      grad_row(in, source, row, saved.of_row(row), target.weight),
      int(target.column),
      out.grad_scale != nullptr};
  const double sum =
      gradient.write(logits_of(in, row), grad, 0, int(in.vocab_size), thread, threads);
  write_zeros(grad, int(in.vocab_size), int(in.columns), thread, threads);
  if (out.grad_scale == nullptr) return;

  double total = warp_sum(sum);
  if (!share.is_warp()) {
    double* sums = simt::dynamic_shared<double>();
    if (simt::lane() == 0) sums[simt::warp_index()] = total;
    simt::block_sync();
    total = 0;
    for (int w = 0; w < share.warps_per_row; ++w) total += sums[w];
  }
  if (thread == 0) out.grad_scale[row] = Real(total);
}

}  // namespace llmloss::cuda
