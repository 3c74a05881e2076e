// How work is distributed over a device. Every choice of a launch is a plain function of the
// problem's size; `llmloss info --plan N V dtype` prints the choices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace llmloss::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_per_block;  // bytes, the most that a launch may request
  int64_t shared_per_multiprocessor;
  int max_cluster;  // blocks; 1: the device has no clusters
};

inline constexpr int max_warps_per_block = 8;
inline constexpr int most_warps_of_many_rows = 4;
inline constexpr int stats_blocks_per_multiprocessor = 8;  // of so many warps
inline constexpr int most_fused_warps = 12;
inline constexpr int most_holding_warps = 20;
inline constexpr int64_t tile_bytes = 32 * 8 * 16;  // lanes, vectors for each, their bytes
inline constexpr int max_chunks = 256;
// Where a row needs a cluster, so many blocks should share a multiprocessor: while some wait for
// others, the rest keeps the memory busy.
inline constexpr int fused_blocks_per_multiprocessor = 2;
inline constexpr int scale_threads = 1024;        // per multiprocessor
inline constexpr int64_t reserved_shared = 1024;  // bytes per block, reserved by the system
inline constexpr int fewest_chunks = 2;  // per block, when few rows are spread over clusters
inline constexpr int64_t shortest_fused = 1024;    // bytes of a row
inline constexpr int64_t coefficient_bytes = 128;  // at most, of a row's gradient
inline constexpr int64_t max_blocks = 0x7fffffff;
inline constexpr int64_t max_columns = int64_t{1} << 30;  // kernels count columns in 32 bits

// The least bytes of a gradient that a block writes: few enough that neighbouring blocks work on
// neighbouring memory, and many compared with what a block does before it begins.
inline constexpr int64_t grad_block_bytes = 32 << 10;

// `columns` includes padding.
inline void check_columns(int64_t columns) {
  if (columns > max_columns) throw std::invalid_argument("rows have too many columns");
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a row is cut into chunks. This depends only on the row's length and type, since the cut
// decides the bits of the result.
struct ChunkPlan {
  int columns;  // per chunk
  int count;
};

inline ChunkPlan plan_chunks(int64_t vocab_size, int64_t element_bytes) {
  check_columns(vocab_size);
  int columns = int(tile_bytes / element_bytes);
  while (ceil_div(vocab_size, columns) > max_chunks) columns *= 2;
  return {columns, int(ceil_div(vocab_size, columns))};
}

// How blocks and warps share the rows.
struct SharePlan {
  int warps_per_row;   // 1: each warp has a row of its own
  int blocks_per_row;  // more than 1 if there are too few rows to fill the device
  int64_t blocks;
  int threads;
};

// units: the pieces of a row that are large enough for a warp.
inline SharePlan plan_share(int64_t rows, int64_t units, const DeviceLimits& device, bool may_split,
                            int most_warps = max_warps_per_block) {
  int warps = 1;
  while (warps < most_warps && units >= 4 * warps) warps *= 2;
  int64_t blocks_per_row = 1;
  if (may_split && warps > 1 && rows < device.multiprocessors) {
    // Smaller blocks, if otherwise some multiprocessors would have none.
    while (warps > 2 && rows * ceil_div(units, warps) < device.multiprocessors) warps /= 2;
    // Two blocks per multiprocessor, or fewer, so that every warp has work.
    const int64_t wanted =
        ceil_div(2 * int64_t{device.multiprocessors}, std::max<int64_t>(rows, 1));
    blocks_per_row = std::min(wanted, ceil_div(units, warps));
  }
  const int64_t blocks = warps == 1 ? ceil_div(rows, max_warps_per_block) : rows * blocks_per_row;
  if (blocks > max_blocks) throw std::invalid_argument("too many rows for one launch");
  return {warps, int(blocks_per_row), blocks, 32 * (warps == 1 ? max_warps_per_block : warps)};
}

struct StatsPlan {
  ChunkPlan chunks;
  SharePlan share;
  int64_t shared_bytes;
  int64_t workspace_bytes;  // device memory for the chunks' states of rows that blocks share
};

inline StatsPlan plan_stats(int64_t rows, int64_t vocab_size, int64_t element_bytes,
                            int64_t state_bytes, const DeviceLimits& device) {
  const ChunkPlan chunks = plan_chunks(vocab_size, element_bytes);
  // Where there are rows enough, smaller blocks: while one merges its states, more others load.
  const bool is_full = rows >= int64_t{device.multiprocessors} * stats_blocks_per_multiprocessor;
  const int most_warps = is_full ? most_warps_of_many_rows : max_warps_per_block;
  const SharePlan share = plan_share(rows, chunks.count, device, true, most_warps);
  const int64_t states = chunks.count * state_bytes;
  const bool is_split = share.blocks_per_row > 1;
  return {chunks, share, is_split || share.warps_per_row == 1 ? 0 : states,
          is_split ? rows * states : 0};
}

struct GradPlan {
  SharePlan share;
  int64_t shared_bytes;
};

// with_scale: a single block processes a row, and sums the scale's gradient over it.
inline GradPlan plan_grad(int64_t rows, int64_t columns, int64_t element_bytes, bool with_scale,
                          const DeviceLimits& device) {
  check_columns(columns);
  const int64_t bytes = columns * element_bytes;
  SharePlan share = plan_share(rows, ceil_div(bytes, tile_bytes), device, !with_scale);
  if (!with_scale && share.warps_per_row > 1) {
    const int64_t blocks_per_row =
        std::max(bytes / grad_block_bytes, int64_t{share.blocks_per_row});
    share.blocks_per_row = int(blocks_per_row);
    share.blocks = rows * blocks_per_row;
    if (share.blocks > max_blocks) throw std::invalid_argument("too many rows for one launch");
  }
  const int64_t sums = with_scale ? share.warps_per_row * int64_t{sizeof(double)} : 0;
  const int64_t rows_per_block = share.warps_per_row == 1 ? max_warps_per_block : 1;
  return {share, rows_per_block * coefficient_bytes + sums};
}

// A factor of 1, the common case, costs only the start of the blocks. So there are no more blocks
// than the device can run at once, and each loops over rows.
inline SharePlan plan_scale(int64_t rows, int64_t columns, int64_t element_bytes,
                            const DeviceLimits& device) {
  check_columns(columns);
  SharePlan share = plan_share(rows, ceil_div(columns * element_bytes, tile_bytes), device, true);
  if (share.blocks_per_row == 1) {
    const int64_t resident = int64_t{device.multiprocessors} * scale_threads / share.threads;
    share.blocks = std::min(share.blocks, std::max<int64_t>(resident, 1));
  }
  return share;
}

struct FusedPlan {
  bool is_fused;  // otherwise the statistics and the gradient kernel run one after the other
  ChunkPlan chunks;
  int cluster;  // blocks per row
  int slice_chunks;
  int staged_chunks;  // of a slice, kept in shared memory
  bool holds;         // the rest of it in registers; otherwise it is read twice
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// can_hold: whether a kernel can hold chunks in registers.
inline FusedPlan plan_fused(int64_t rows, int64_t vocab_size, int64_t element_bytes,
                            int64_t state_bytes, bool can_hold, const DeviceLimits& device) {
  FusedPlan plan{};
  plan.chunks = plan_chunks(vocab_size, element_bytes);
  const int64_t states = ceil_div(coefficient_bytes + plan.chunks.count * state_bytes, 16) * 16;
  const auto slice_chunks = [&](int cluster) { return int(ceil_div(plan.chunks.count, cluster)); };
  const auto shared_bytes = [&](int staged_chunks) {
    const int64_t columns = std::min(int64_t{staged_chunks} * plan.chunks.columns, vocab_size);
    const int64_t arrivals = ceil_div(staged_chunks, 2) * 16;
    return states + arrivals + ceil_div(columns * element_bytes, 16) * 16 + 16;  // 16: a skew
  };
  int most_staged = plan.chunks.count;
  while (most_staged > 0 && shared_bytes(most_staged) > device.shared_per_block) --most_staged;
  const int64_t comfortable = std::min(
      device.shared_per_block,
      device.shared_per_multiprocessor / fused_blocks_per_multiprocessor - reserved_shared);
  int cluster = 1;
  while (cluster < device.max_cluster && shared_bytes(slice_chunks(cluster)) > comfortable) {
    cluster *= 2;
  }
  // Fewer blocks that have a multiprocessor each are faster, if nothing is read twice and if they
  // fill its shared memory. (An H200: 65,536 bfloat16 columns, half of it, 0.73 of a copy; in
  // clusters of two small blocks 0.85.)
  if (can_hold && plan.chunks.columns * element_bytes == tile_bytes) {
    const int most_chunks = most_staged + most_holding_warps;
    int alone = 1;
    while (alone < cluster && slice_chunks(alone) > most_chunks) alone *= 2;
    const int slice = slice_chunks(alone);
    const bool needs_registers = slice > most_staged && slice <= most_chunks;
    const bool fills =
        4 * shared_bytes(std::min(slice, most_staged)) >= 3 * device.shared_per_block;
    if (needs_registers || (alone < cluster && fills)) {
      plan.holds = true;
      cluster = alone;
    }
  }
  // With few rows, each gets more blocks, as long as a block has a few chunks: the shared memory of
  // a multiprocessor, not its number of warps, limits the loads in flight.
  while (cluster < device.max_cluster && rows * cluster * 2 <= device.multiprocessors &&
         plan.chunks.count >= 2 * cluster * fewest_chunks) {
    cluster *= 2;
    plan.holds = plan.holds && shared_bytes(slice_chunks(cluster)) > comfortable;
  }
  plan.cluster = cluster;
  plan.slice_chunks = slice_chunks(cluster);
  plan.staged_chunks = std::min(plan.slice_chunks, most_staged);
  plan.shared_bytes = shared_bytes(plan.staged_chunks);
  // One warp per chunk, but at least four for the gradient, which is not divided into chunks.
  // Blocks of which three do not fit in a multiprocessor need more of them.
  const int64_t least = plan.chunks.count < 4 ? 1 : 4;
  const bool is_large = plan.shared_bytes > device.shared_per_multiprocessor / 3 - reserved_shared;
  const int most = plan.holds ? most_holding_warps
                   : is_large ? most_fused_warps
                              : max_warps_per_block;
  const int warps = int(std::clamp<int64_t>(plan.slice_chunks, least, most));
  plan.threads = 32 * warps;
  plan.blocks = rows * plan.cluster;
  // The separate kernels are faster for the shortest rows, which get a warp each, and for a few
  // long rows, which get the whole device.
  const bool is_short = vocab_size * element_bytes < shortest_fused;
  const bool is_idle =
      2 * plan.blocks < device.multiprocessors && plan.slice_chunks > most_fused_warps;
  plan.is_fused = !is_short && !is_idle && plan.blocks <= max_blocks;
  return plan;
}

}  // namespace llmloss::cuda
