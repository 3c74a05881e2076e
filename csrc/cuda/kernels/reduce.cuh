// Reduces one number per row to one number: losses, denominators, sums.
#pragma once

#include "../../core/loss_rows.h"
#include "../device/merge.cuh"

namespace llmloss::cuda {

// The sum over rows of value(row), returned to the first thread of a single block: in double, and
// in an order that only the number of rows decides. One block is enough: 1,024 threads read the
// numbers of a million rows in the time that the logits of a few dozen rows take.
template <typename Value>
__device__ __forceinline__ double block_total(int64_t rows, const Value& value) {
  double sum = 0;
  for (int64_t row = simt::thread_index(); row < rows; row += simt::block_threads()) {
    sum += value(row);
  }
  double* sums = simt::dynamic_shared<double>();
  sum = warp_sum(sum);
  if (simt::lane() == 0) sums[simt::warp_index()] = sum;
  simt::block_sync();
  const unsigned warps = simt::block_threads() / warp_size;
  return simt::warp_index() == 0 ? warp_sum(simt::lane() < warps ? sums[simt::lane()] : 0.0) : 0.0;
}

// Reads the rows' statistics and writes the loss: one block for a mean or a sum, otherwise one
// thread per row.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    reduce_loss_kernel(const __grid_constant__ LossRows<Real> rows, const Reduction reduction,
                       Real* loss) {
  if (reduction == Reduction::none) {
    const int64_t first = int64_t{simt::block_index_x()} * simt::block_threads();
    const int64_t row = first + simt::thread_index();
    if (row < rows.rows) loss[row] = rows.loss(row);
    return;
  }
  const double total = block_total(rows.rows, [&](int64_t row) { return rows.loss(row); });
  if (simt::thread_index() == 0) {
    *loss = Real(total / double(rows.denominator.value()));
  }
}

// Reads the targets and their weights and writes the denominator of the mean: MeanDenominator.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    denominator_kernel(const __grid_constant__ LossRows<Real> rows, Real* denominator) {
  double shares = 0, weights = 0;
  if (rows.num_items == nullptr) {
    shares = block_total(rows.rows, [&](int64_t row) { return rows.share(row); });
  }
  if (rows.num_items == nullptr && rows.counts_weights()) {
    simt::block_sync();  // the first warp has read the sums of the others
    weights = block_total(rows.rows, [&](int64_t row) { return rows.weight(row); });
  }
  if (simt::thread_index() == 0) rows.write_denominator(shares, weights, denominator);
}

// Reads `count` numbers and writes their sum.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    sum_kernel(const Real* values, const int64_t count, Real* sum) {
  const double total = block_total(count, [&](int64_t i) { return values[i]; });
  if (simt::thread_index() == 0) *sum = Real(total);
}

}  // namespace llmloss::cuda
