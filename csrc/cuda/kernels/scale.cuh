// Multiplies rows by a number in device memory.
#pragma once

#include "chunks.cuh"
#include "share.cuh"

namespace llmloss::cuda {

// Reads and writes each row. If the factor is 1, it reads only the factor; if it is 0, nan and inf
// become 0, too. Each block loops over several rows, so that the launch starts few blocks.
template <typename T>
__global__ void __launch_bounds__(block_size)
    scale_kernel(T* data, const RowLayout layout, const int64_t rows, const int64_t columns,
                 const real_t<T>* factor, const RowShare share) {
  const real_t<T> by = *factor;
  if (by == real_t<T>(1)) return;
  const auto scaled = [by](real_t<T> x) { return by == real_t<T>(0) ? real_t<T>(0) : x * by; };
  for (int64_t row = share.row(); row < rows; row += share.rows_at_once()) {
    T* const at = data + layout.offset(row);
    Peeled<T>(at, int(columns))
        .each(
            share.thread(), share.threads(),
            [&](int i) {
              const Words words = simt::load_words(at + i);
              real_t<T> x[Vector<T>::size];
#pragma unroll
              for (int e = 0; e < Vector<T>::size; ++e) x[e] = scaled(element<T>(words, e));
              simt::store_words(at + i, packed<T>(x));
            },
            [&](int i) { from_real(scaled(to_real(at[i])), at[i]); });
  }
}

}  // namespace llmloss::cuda
