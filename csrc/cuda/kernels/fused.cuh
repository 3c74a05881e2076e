// Statistics and gradient from one read of the logits.
#pragma once

#include <type_traits>

#include "gradient.cuh"
#include "row_stats.cuh"

namespace llmloss::cuda {

// The most threads of a block, and the number of such blocks that a multiprocessor should hold:
// three of 256 threads fit, too.
inline constexpr int fused_block_size = 384;
template <typename T, unsigned tasks>
inline constexpr int fused_blocks =
    // float16 would spill by a few bytes.
    planned_blocks(tasks, sizeof(T)) > 2 && (tasks == task::plain || !std::is_same_v<T, Half>) ? 2
                                                                                               : 1;

// Columns of a row that warps copy to shared memory, each the chunks that it reduces. They keep
// their offset from a multiple of 16 bytes, so that whole vectors can be copied.
template <typename T>
class StagedColumns {
 public:
  __device__ __forceinline__ StagedColumns(const Columns<T>& from, T* room)
      : from_(from), to_(room + from.skew() / sizeof(T)), peeled_(from.data, from.count) {}

  __device__ __forceinline__ Columns<T> columns() const { return {to_, from_.first, from_.count}; }

  // Whether a chunk's vectors are those that its warp has copied. Otherwise its first one may have
  // been copied by another warp.
  __device__ __forceinline__ bool is_aligned() const { return from_.skew() == 0; }

  // This warp starts to copy the columns [begin, end), as one group of copies.
  __device__ __forceinline__ void start(int begin, int end) const {
    const int first = begin - from_.first, last = end - from_.first;
    const int last_vector = first_vector(last);
    int v = first_vector(first) + int(simt::lane());
    const T* const source = from_.data + peeled_.head;
    T* const target = to_ + peeled_.head;
    constexpr int width = Vector<T>::size, stride = int(warp_size);
    for (; v + (tile_vectors - 1) * stride < last_vector; v += tile_vectors * stride) {
#pragma unroll
      for (int i = 0; i < tile_vectors; ++i) {
        const int at = (v + i * stride) * width;
        simt::copy_async(target + at, source + at);
      }
    }
#pragma unroll 1
    for (; v < last_vector; v += stride) simt::copy_async(target + v * width, source + v * width);
    if (peeled_.singles > 0) {
      for (int i = int(simt::lane()); i < peeled_.singles; i += int(warp_size)) {
        const int at = peeled_.single(i);
        if (at >= first && at < last) to_[at] = from_.data[at];
      }
    }
    simt::close_group_of_copies();
  }

 private:
  // That begins at element i or behind it.
  __device__ __forceinline__ int first_vector(int i) const {
    constexpr int width = Vector<T>::size;
    return clamp_of((i - peeled_.head + width - 1) / width, 0, peeled_.vectors);
  }

  Columns<T> from_;
  T* to_;
  Peeled<T> peeled_;
};

// A cluster of blocks for each row, each with `slice_chunks` of its chunks. Reads the logits once,
// keeps them in shared memory, exchanges the chunks' states among the blocks, and overwrites the
// logits with the gradient: 2 x rows x columns x sizeof(T) bytes of traffic, half of that for a row
// without a gradient (of which each warp reads one chunk in vain). Of a slice that does not fit in
// shared memory, the chunks after `staged_chunks` are read twice, the second time from L2 if those
// of all rows in flight fit there.
template <typename T, unsigned stats_tasks, unsigned grad_tasks>
__global__ void __launch_bounds__(fused_block_size, (fused_blocks<T, stats_tasks>))
    fused_kernel(const __grid_constant__ RowInputs<T> in,
                 const __grid_constant__ RowOutputs<real_t<T>> out,
                 const __grid_constant__ GradSource<real_t<T>> source,
                 const __grid_constant__ GradOutputs<T> grads, const Chunks chunks,
                 const int slice_chunks, const int staged_chunks) {
  using Real = real_t<T>;
  using State = PartialState<Real>;
  using Reducer = ColumnReducer<T, stats_tasks>;
  const unsigned rank = simt::cluster_rank(), blocks = simt::cluster_blocks();
  const int64_t row = simt::block_index_x() / blocks;
  const int thread = int(simt::thread_index()), threads = int(simt::block_threads());
  const int warp = int(simt::warp_index()), warps = threads / int(warp_size);
  const int vocab_size = int(in.vocab_size);
  // This block's chunks are [first_chunk, last_chunk), and its columns [begin, end). Those before
  // staged_chunk and staged_end are kept in shared memory.
  const int first_chunk = min_of(int(rank) * slice_chunks, chunks.count);
  const int last_chunk = min_of(first_chunk + slice_chunks, chunks.count);
  const int staged_chunk = min_of(first_chunk + staged_chunks, last_chunk);
  const auto begin_of = [&](int chunk) { return min_of(chunk * chunks.columns, vocab_size); };
  const int begin = begin_of(first_chunk), end = begin_of(last_chunk);
  const int staged_end = begin_of(staged_chunk);

  // Shared memory: the row's coefficients, the states of all chunks, then the staged columns.
  GradRow<Real>* const coefficients = simt::dynamic_shared<GradRow<Real>>();
  State* const states = reinterpret_cast<State*>(coefficients + 1);
  const T* const logits = in.logits + in.layout.offset(row);
  const StagedColumns<T> staged({logits + begin, begin, staged_end - begin},
                                reinterpret_cast<T*>(vector_boundary(states + chunks.count)));
  // The first copies are on their way while the target is read, which may say that none is needed.
  int chunk = first_chunk + warp;
  if (chunk < staged_chunk) staged.start(begin_of(chunk), begin_of(chunk + 1));

  T* const grad = grads.grad + grads.layout.offset(row);
  const bool counts_nothing = in.targets.ignored(row) || source.vanishes(row);
  if (counts_nothing || !is_active(in, row)) {  // the same in all blocks of the cluster
    simt::wait_for_copies(0);                   // nobody looks at what they bring
    if (rank == 0 && thread == 0) {
      write_statistics(out, row, absent_statistics<double>(counts_nothing, in.vocab_size));
    }
    write_zeros(grad, 0, int(in.columns), int(rank) * threads + thread, int(blocks) * threads);
    return;
  }

  simt::cluster_arrive();
  int later = 0;  // groups of copies that this warp has started after the first
  for (chunk += warps; chunk < staged_chunk; chunk += warps, ++later) {
    staged.start(begin_of(chunk), begin_of(chunk + 1));
  }
  LogitTransform<Real> transform;
  if constexpr (task::has(stats_tasks, task::transformed)) transform = in.transform.resolved();
  Target<Real> target = target_class(in, row);
  read_logit(in, transform, row, target);  // before the gradient overwrites it
  const Reducer reducer{in, transform, row, target.logit, int(target.column)};
  if (!staged.is_aligned()) {
    simt::wait_for_copies(0);
    simt::block_sync();
  }
  simt::cluster_wait();  // the other blocks have started: their shared memory can be written

  const Columns<T> columns = staged.columns();
  const Columns<T> others{logits + staged_end, staged_end, end - staged_end};
  for (chunk = first_chunk + warp; chunk < last_chunk; chunk += warps) {
    const bool is_staged = chunk < staged_chunk;
    if (is_staged && staged.is_aligned()) {
      simt::wait_for_copies(later--);
      simt::warp_sync();
    }
    const int from = begin_of(chunk), to = begin_of(chunk + 1);
    const State state =
        is_staged ? reducer.chunk(columns, from, to) : reducer.chunk(others, from, to);
    if (simt::lane() < blocks) {
      copy_fields(state, *simt::peer_shared(states + chunk, simt::lane()), Reducer::wanted());
    }
  }
  simt::cluster_sync();  // all states have arrived, and no block reads the row any more

  // One warp computes what is the same for the row. Most losses need only the state for their
  // gradient; for the others it has the same bits as what row_grad_kernel loads.
  State total;
  if (warp == 0) {
    total = merge_chunks(states, chunks.count, Reducer::wanted());
    RowStats<Real> known;
    if (source.options.gradient_reads_values()) {
      known = finalize_row(total, target.logit, in.vocab_size).template as<Real>();
    }
    known.state = row_state(total, target.logit);
    const GradRow<Real> computed = grad_row(in, source, row, known, target.weight);
    if (simt::lane() == 0) *coefficients = computed;
  }
  simt::block_sync();
  if (rank == 0 && thread == 0) {
    write_statistics(out, row, finalize_row(total, target.logit, in.vocab_size));
  }
  const ColumnGradient<T, grad_tasks> gradient{in, transform, row, int(target.column), false};
  gradient.write(*coefficients, columns, grad + begin, begin, staged_end, {thread, threads});
  if (staged_end < end) {
    gradient.write(*coefficients, others, grad + staged_end, staged_end, end, {thread, threads});
  }
  if (rank == blocks - 1) write_zeros(grad, vocab_size, int(in.columns), thread, threads);
}

}  // namespace llmloss::cuda
