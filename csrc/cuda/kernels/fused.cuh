// Statistics and gradient from one read of the logits.
#pragma once

#include "gradient.cuh"
#include "row_stats.cuh"

namespace llmloss::cuda {

// Starts to copy columns of a row to shared memory, and returns where they will be. They keep their
// offset from a multiple of 16 bytes, so that whole vectors can be copied.
template <typename T>
__device__ __forceinline__ Columns<T> stage(const Columns<T>& from, T* room) {
  T* const to = room + from.skew() / sizeof(T);
  const int thread = int(simt::thread_index()), threads = int(simt::block_threads());
  const Peeled<T> peeled(from.data, from.count);
#pragma unroll 4
  for (int v = thread; v < peeled.vectors; v += threads) {
    simt::copy_async(to + peeled.vector(v), from.data + peeled.vector(v));
  }
  for (int i = thread; i < peeled.singles; i += threads) {
    to[peeled.single(i)] = from.data[peeled.single(i)];
  }
  return {to, from.first, from.count};
}

// A cluster of blocks for each row, each with `slice_chunks` of its chunks. Reads the logits once,
// keeps them in shared memory, exchanges the chunks' states among the blocks, and overwrites the
// logits with the gradient: 2 x rows x columns x sizeof(T) bytes of traffic, half of that for a row
// without a gradient. If a row does not fit in the cluster's memory (staged is false), a single
// block reads it twice, the second time from L2 if the rows in flight fit there.
template <typename T, bool plain_stats, bool plain_grad, bool staged>
__global__ void __launch_bounds__(block_size, planned_blocks<T, plain_stats>)
    fused_kernel(const __grid_constant__ RowInputs<T> in,
                 const __grid_constant__ RowOutputs<real_t<T>> out,
                 const __grid_constant__ GradSource<real_t<T>> source,
                 const __grid_constant__ GradOutputs<T> grads, const Chunks chunks,
                 const int slice_chunks) {
  using Real = real_t<T>;
  using State = PartialState<Real>;
  const unsigned rank = simt::cluster_rank(), blocks = simt::cluster_blocks();
  const int64_t row = simt::block_index_x() / blocks;
  const int thread = int(simt::thread_index()), threads = int(simt::block_threads());
  T* const grad = grads.grad + grads.layout.offset(row);
  const Real of_loss = source.of_loss(row);
  const bool counts_nothing = in.targets.ignored(row) || of_loss == Real(0);
  if (counts_nothing || !is_active(in, row)) {  // the same in all blocks of the cluster
    if (rank == 0 && thread == 0) {
      write_statistics(out, row, absent_statistics<double>(counts_nothing, in.vocab_size));
    }
    write_zeros(grad, 0, int(in.columns), int(rank) * threads + thread, int(blocks) * threads);
    return;
  }

  simt::cluster_arrive();
  const int vocab_size = int(in.vocab_size);
  const int first_chunk = min_of(int(rank) * slice_chunks, chunks.count);
  const int last_chunk = min_of(first_chunk + slice_chunks, chunks.count);
  const int begin = min_of(first_chunk * chunks.columns, vocab_size);
  const int end = min_of(last_chunk * chunks.columns, vocab_size);

  // Shared memory: the states of all chunks, then the slice.
  State* const states = simt::dynamic_shared<State>();
  Columns<T> columns{in.logits + in.layout.offset(row) + begin, begin, end - begin};
  if constexpr (staged) {
    const int room = (chunks.count * int(sizeof(State)) + vector_bytes - 1) / vector_bytes;
    columns = stage(columns, simt::dynamic_shared<T>() + room * Vector<T>::size);
  }
  const LogitTransform<Real> transform = in.transform.resolved();
  const Target<Real> target = target_of(in, transform, row);  // before the gradient overwrites it
  const Wanted wanted = plain_stats ? Wanted{} : Wanted::by(out);
  const ColumnReducer<T, plain_stats> reducer{in,           transform,          row,
                                              target.logit, int(target.column), wanted};
  if constexpr (staged) {
    simt::wait_for_copies();
    simt::block_sync();  // the slice is complete
  }
  simt::cluster_wait();  // the other blocks have started: their shared memory can be written

  for (int chunk = first_chunk + int(simt::warp_index()); chunk < last_chunk;
       chunk += threads / int(warp_size)) {
    const int from = chunk * chunks.columns;
    const State state = reducer.chunk(columns, from, min_of(from + chunks.columns, vocab_size));
    if (simt::lane() < blocks) *simt::peer_shared(states + chunk, simt::lane()) = state;
  }
  simt::cluster_sync();  // all states have arrived, and no block reads the row any more
  const State total = merge_chunks(states, chunks.count, wanted);

  // Most losses need only the state for their gradient. For the others, every thread computes the
  // statistics that row_grad_kernel would load, with the same bits.
  const bool writes = rank == 0 && thread == 0;
  RowStats<double> stats;
  if (writes || source.options.gradient_reads_values()) {
    stats = finalize_row(total, target.logit, in.vocab_size);
  }
  if (writes) write_statistics(out, row, stats);
  RowStats<Real> known;
  known.floats = stats.floats.template as<Real>();
  known.state[StateField::reference] = total.reference();
  known.state[StateField::sum_exp] = total.sum_exp;
  known.state[StateField::sum_weights] = total.sum_weights;
  const auto upstream = [&](const FloatStats<Real>& values) {
    return loss_upstream(source.denominator.options(source.options), of_loss, values,
                         target.weight);
  };
  const ColumnGradient<T, plain_grad> gradient{
      in, transform, row, grad_row(in, known, upstream), int(target.column), false};
  gradient.write(columns, grad + begin, begin, end, thread, threads);
  if (rank == blocks - 1) write_zeros(grad, vocab_size, int(in.columns), thread, threads);
}

}  // namespace llmloss::cuda
