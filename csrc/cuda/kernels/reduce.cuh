// Reduces one number per row to one number: losses, denominators, sums.
#pragma once

#include "../../core/loss_rows.h"
#include "../device/merge.cuh"

namespace llmloss::cuda {

// The sum over rows of value(read(row)), returned to the first thread of a single block: in double,
// and in an order that only the number of rows decides. One block is enough: 1,024 threads, each
// with a few reads under way, read the numbers of a million rows in the time that the logits of a
// few dozen rows take.
template <typename Read, typename Value>
__device__ __forceinline__ double block_total(int64_t rows, const Read& read, const Value& value) {
  using Row = decltype(read(rows));
  constexpr int reads = sizeof(Row) > 48 ? 2 : 4;
  const int64_t threads = simt::block_threads();
  double sum = 0;
  for (int64_t first = simt::thread_index(); first < rows; first += reads * threads) {
    Row numbers[reads];
#pragma unroll
    for (int i = 0; i < reads; ++i) {
      if (first + i * threads < rows) numbers[i] = read(first + i * threads);
    }
#pragma unroll
    for (int i = 0; i < reads; ++i) {
      if (first + i * threads < rows) sum += value(numbers[i]);
    }
  }
  double* sums = simt::dynamic_shared<double>();
  sum = warp_sum(sum);
  if (simt::lane() == 0) sums[simt::warp_index()] = sum;
  simt::block_sync();
  const unsigned warps = simt::block_threads() / warp_size;
  return simt::warp_index() == 0 ? warp_sum(simt::lane() < warps ? sums[simt::lane()] : 0.0) : 0.0;
}

template <typename Real, typename Value>
__device__ __forceinline__ double total_of(const LossRows<Real>& rows, const Value& value) {
  return block_total(rows.rows, [&](int64_t row) { return rows.read(row); }, value);
}

// Writes the loss.
template <typename Real>
__device__ __forceinline__ void reduce_losses(const LossRows<Real>& rows, Real* loss) {
  const double total = total_of(rows, [&](const auto& row) { return rows.loss(row); });
  if (simt::thread_index() == 0) *loss = Real(total / double(rows.denominator.value()));
}

// Writes the denominator of the mean: MeanDenominator.
template <typename Real>
__device__ __forceinline__ void count_items(const LossRows<Real>& rows, Real* denominator) {
  double shares = 0, weights = 0;
  if (rows.num_items == nullptr) {
    shares = total_of(rows, [&](const auto& row) { return rows.share(row); });
  }
  if (rows.num_items == nullptr && rows.counts_weights()) {
    simt::block_sync();  // the first warp has read the sums of the others
    weights = total_of(rows, [&](const auto& row) { return rows.weight(row); });
  }
  if (simt::thread_index() == 0) rows.write_denominator(shares, weights, denominator);
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
    if (row < rows.rows) loss[row] = rows.loss(rows.read(row));
  } else {
    reduce_losses(rows, loss);
  }
}

// Reads the targets and their weights and writes the denominator of the mean.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    denominator_kernel(const __grid_constant__ LossRows<Real> rows, Real* denominator) {
  count_items(rows, denominator);
}

// Both, where nobody needs the denominator before the loss.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    mean_loss_kernel(const __grid_constant__ LossRows<Real> rows, Real* denominator, Real* loss) {
  count_items(rows, denominator);
  simt::block_sync();  // the denominator is there, and the sums have been read
  LossRows<Real> counted = rows;
  counted.denominator = {denominator};
  reduce_losses(counted, loss);
}

// Reads `count` numbers and writes their sum.
template <typename Real>
__global__ void __launch_bounds__(1024, 1)
    sum_kernel(const Real* values, const int64_t count, Real* sum) {
  const double total = block_total(
      count, [&](int64_t i) { return values[i]; }, [](Real number) { return double(number); });
  if (simt::thread_index() == 0) *sum = Real(total);
}

}  // namespace llmloss::cuda
