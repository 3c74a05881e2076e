// Statistics and gradient of the plain loss from one read of the logits. Where more is computed, a
// fused kernel's registers leave room for too few warps. (An H200, 8192 x 128256 bfloat16: softcap
// 2.43 ms fused, 2.17 ms apart; label smoothing 2.31 ms fused, and apart 0.6 and 1.0 ms.)
#pragma once

#include <type_traits>

#include "gradient.cuh"
#include "row_stats.cuh"

namespace llmloss::cuda {

// Whether there is a kernel that holds tiles in registers.
template <typename T>
inline constexpr bool fused_can_hold = sizeof(T) < 8;

// The most threads of a block, and the number of such blocks that a multiprocessor should hold:
// three of 256 threads fit, too. A block that holds tiles has a multiprocessor for itself.
template <bool holds>
inline constexpr int fused_block_size = holds ? 640 : 384;
template <typename T>
constexpr int fused_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (sizeof(T) == 4) return 1;  // it would spill
#endif
  return sizeof(T) < 8 ? 2 : 1;
}

// Columns of a row that warps copy to shared memory, a chunk at a time. They keep their offset from
// a multiple of 16 bytes, so that whole vectors can be copied.
template <typename T, bool is_aligned>
class StagedColumns {
 public:
  using From = Columns<T, is_aligned>;

  // Shared memory: an Arrival for each chunk, then the columns.
  __device__ __forceinline__ StagedColumns(const From& from, const Chunks& chunks, int first_chunk,
                                           Arrival* arrivals, int count)
      : from_(from),
        chunks_(chunks),
        first_chunk_(first_chunk),
        arrivals_(arrivals),
        to_(static_cast<T*>(vector_boundary(arrivals + count)) + from.skew() / sizeof(T)),
        peeled_(from.data, from.count) {}

  __device__ __forceinline__ From columns() const { return {to_, from_.first, from_.count}; }

  // This warp starts to copy a chunk.
  __device__ __forceinline__ void start(int chunk) const {
    const int first = chunk_begin(chunk), last = chunk_begin(chunk + 1);
    const int first_element = peeled_.vector(first_vector(first));
    const int bytes = (first_vector(last) - first_vector(first)) * vector_bytes;
    simt::start_copy(to_ + first_element, from_.data + first_element, bytes,
                     arrivals_ + (chunk - first_chunk_));
    for (int i = int(simt::lane()); i < peeled_.singles; i += int(warp_size)) {
      const int at = peeled_.single(i);
      if (at >= first && at < last) to_[at] = from_.data[at];
    }
  }

  // Waits for the columns of a chunk. All copies have been started. The first vector of a chunk
  // that is not aligned belongs to the chunk before.
  __device__ __forceinline__ void wait(int chunk) const {
    simt::wait_for(arrivals_ + (chunk - first_chunk_));
    if (from_.skew() != 0 && chunk > first_chunk_) {
      simt::wait_for(arrivals_ + (chunk - first_chunk_ - 1));
    }
  }

 private:
  // Counted from the first column.
  __device__ __forceinline__ int chunk_begin(int chunk) const {
    return min_of((chunk - first_chunk_) * chunks_.columns, from_.count);
  }
  // That begins at element i or behind it.
  __device__ __forceinline__ int first_vector(int i) const {
    constexpr int width = Vector<T>::size;
    return clamp_of((i - peeled_.head + width - 1) / width, 0, peeled_.vectors);
  }

  From from_;
  Chunks chunks_;
  int first_chunk_;
  Arrival* arrivals_;
  T* to_;
  Peeled<T> peeled_;
};

// A cluster of blocks for each row, each with `slice_chunks` of its chunks. Reads the logits once,
// keeps them in shared memory, exchanges the chunks' states among the blocks, and overwrites the
// logits with the gradient: 2 x rows x columns x sizeof(T) bytes of traffic, half of that for a row
// without a gradient (of which each warp reads one chunk in vain). Of a slice that does not fit in
// shared memory, a warp keeps one of the chunks after `staged_chunks` in registers, if it `holds`
// any: rows begin at multiples of 16 bytes then. Or they are read twice, the second time from L2 if
// those of all rows in flight fit there.
template <typename T, bool holds>
__global__ void __launch_bounds__(fused_block_size<holds>, (holds ? 1 : fused_blocks<T>()))
    fused_kernel(const __grid_constant__ RowInputs<T> in,
                 const __grid_constant__ RowOutputs<real_t<T>> out,
                 const __grid_constant__ GradSource<real_t<T>> source,
                 const __grid_constant__ GradOutputs<T> grads, const Chunks chunks,
                 const int slice_chunks, const int staged_chunks) {
  using Real = real_t<T>;
  using State = PartialState<Real>;
  using Reducer = ColumnReducer<T, task::plain>;
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
  const StagedColumns<T, holds> staged(
      {logits + begin, begin, staged_end - begin}, chunks, first_chunk,
      reinterpret_cast<Arrival*>(states + chunks.count), staged_chunks);
  // The first copies are on their way while the target is read, which may say that none is needed.
  const RowTarget read_target(in.targets, row);
  const auto upstream = source.read(row);
  int chunk = first_chunk + warp;
  const bool has_copies = chunk < staged_chunk;
  if (has_copies) staged.start(chunk);

  T* const grad = grads.grad + grads.layout.offset(row);
  const bool counts_nothing = source.vanishes(upstream) || read_target.is_ignored();
  if (counts_nothing ||
      !read_target.is_active(in.vocab_size)) {  // the same in all blocks of the cluster
    if (rank == 0 && thread == 0) {
      write_statistics(out, row, absent_statistics<double>(counts_nothing, in.vocab_size));
    }
    simt::block_sync();
    if (has_copies) staged.wait(chunk);  // nobody looks at what they bring
    write_zeros(grad, 0, int(in.columns), int(rank) * threads + thread, int(blocks) * threads);
    return;
  }

  simt::cluster_arrive();
  for (chunk += warps; chunk < staged_chunk; chunk += warps) staged.start(chunk);
  // What is not staged.
  const Columns<T, holds> others{logits + staged_end, staged_end, end - staged_end};
  const int other_chunk = staged_chunk + warp;
  Tile<T> tile;
  if constexpr (holds) {
    if (other_chunk < last_chunk) {
      tile.load(others, begin_of(other_chunk), begin_of(other_chunk + 1));
    }
  }
  const LogitTransform<Real> identity;
  const Target<Real> target = target_class(in, read_target);
  // Before the gradient overwrites it. Nobody waits for it before the end.
  const StoredTarget<T> stored(in, row, target.column);
  const Reducer reducer{in, identity, row, Real(0), int(target.column)};
  simt::block_sync();    // all copies have been started
  simt::cluster_wait();  // the other blocks have started: their shared memory can be written

  const auto tell = [&](int chunk, const State& state) {
    if (simt::lane() < blocks) {
      copy_fields(state, *simt::peer_shared(states + chunk, simt::lane()), Reducer::wanted());
    }
  };
  const Columns<T, holds> columns = staged.columns();
  for (chunk = first_chunk + warp; chunk < staged_chunk; chunk += warps) {
    staged.wait(chunk);
    tell(chunk, reducer.chunk(columns, begin_of(chunk), begin_of(chunk + 1)));
  }
  for (chunk = other_chunk; chunk < last_chunk; chunk += warps) {
    const int from = begin_of(chunk), to = begin_of(chunk + 1);
    if constexpr (holds) {
      tell(chunk, reducer.chunk(tile, from, to));
    } else {
      tell(chunk, reducer.chunk(others, from, to));
    }
  }
  simt::cluster_sync();  // all states have arrived, and no block reads the row any more

  // One warp computes what is the same for the row's gradient. Most losses need only the state for
  // it; for the others it has the same bits as what row_grad_kernel loads.
  const bool writes_statistics = rank == 0 && warp == warps - 1;
  State total;
  if (warp == 0 || writes_statistics) {
    total = merge_chunks(states, chunks.count, Reducer::wanted());
  }
  const auto finalized = [&] {
    return finalize_row(total, stored.transformed(identity), in.vocab_size, Reducer::wanted());
  };
  if (warp == 0) {
    RowStats<Real> known;
    if (source.options.gradient_reads_values()) known = finalized().template as<Real>();
    known.state = row_state(total, stored.transformed(identity));
    const GradRow<Real> computed = grad_row(in, source, source.read(row), known, target.weight);
    if (simt::lane() == 0) *coefficients = computed;
  }
  simt::block_sync();
  const ColumnGradient<T, task::plain> gradient{in, identity, row, int(target.column), false};
  if constexpr (holds) {
    if (other_chunk < last_chunk) {
      const int from = begin_of(other_chunk);
      gradient.write(*coefficients, tile, others, grad + from, from, begin_of(other_chunk + 1));
    }
  } else if (staged_end < end) {
    gradient.write(*coefficients, others, grad + staged_end, staged_end, end, {thread, threads});
  }
  gradient.write(*coefficients, columns, grad + begin, begin, staged_end, {thread, threads});
  if (rank == blocks - 1) write_zeros(grad, vocab_size, int(in.columns), thread, threads);
  // Last, when no tile is in registers any more; the last warp is the first to have none.
  if (writes_statistics && simt::lane() == 0) write_statistics(out, row, finalized());
}

}  // namespace llmloss::cuda
