// Multiplies rows by a number that lies on the device.
#pragma once

#include "row_stats.cuh"

namespace llmloss::cuda {

// Reads and writes each row, unless the factor is 1: then nothing but the factor is read.
template <typename T>
__global__ void __launch_bounds__(block_size)
    scale_kernel(T* data, const RowLayout layout, const int64_t rows, const int64_t columns,
                 const real_t<T>* factor, const RowShare share) {
  const real_t<T> by = *factor;
  if (by == real_t<T>(1)) return;
  const int64_t row = share.row();
  if (row >= rows) return;
  const int thread = share.thread();
  const int threads = share.threads();
  const auto scaled = [by](T x) {
    from_real(to_real(x) * by, x);
    return x;
  };
  T* const at = data + layout.offset(row);
  Peeled<T>(at, int(columns))
      .each(
          thread, threads,
          [&](int i) {
            Vector<T> vector = load_aligned(at + i);
#pragma unroll
            for (int e = 0; e < Vector<T>::size; ++e) vector.at[e] = scaled(vector.at[e]);
            store_aligned(at + i, vector);
          },
          [&](int i) { at[i] = scaled(at[i]); });
}

}  // namespace llmloss::cuda
