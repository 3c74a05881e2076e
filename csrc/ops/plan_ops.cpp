// Describes the launches for a problem on a device of given limits, as text. Needs no device.
#include <sstream>

#include "../core/row_stats.h"
#include "../cuda/launch/plan.h"
#include "arguments.h"
#include "library.h"

namespace llmloss::ops {
namespace {

void tell(std::ostream& out, const cuda::SharePlan& share) {
  if (share.warps_per_row == 1) {
    out << "a warp for each row";
  } else {
    out << share.blocks_per_row << (share.blocks_per_row == 1 ? " block of " : " blocks of ")
        << share.warps_per_row << " warps for each row";
  }
  out << "; " << share.blocks << " blocks of " << share.threads << " threads";
}

// Lines of the form "kernel: launch".
std::string launch_plan(int64_t rows, int64_t vocab_size, int64_t element_bytes,
                        int64_t multiprocessors, int64_t shared_per_block,
                        int64_t shared_per_multiprocessor, int64_t max_cluster) {
  STD_TORCH_CHECK(rows >= 0 && vocab_size >= 1, "llmloss: expected rows >= 0 and columns >= 1");
  const cuda::DeviceLimits device{int(multiprocessors), shared_per_block, shared_per_multiprocessor,
                                  int(max_cluster)};
  const int64_t state_bytes =
      element_bytes == 8 ? sizeof(PartialState<double>) : sizeof(PartialState<float>);
  std::ostringstream out;
  const auto stats = cuda::plan_stats(rows, vocab_size, element_bytes, state_bytes, device);
  out << "chunks: " << stats.chunks.count << " of " << stats.chunks.columns
      << " columns, each reduced by one warp\nvectors: 16 bytes, " << 16 / element_bytes
      << " columns; " << cuda::tile_bytes / 32 / 16 << " for each lane in a tile\nrow_stats: ";
  tell(out, stats.share);
  out << "; " << stats.shared_bytes << " bytes of dynamic shared memory";
  if (stats.workspace_bytes > 0) {
    out << "; merged by a second kernel from " << stats.workspace_bytes << " bytes";
  }
  const auto grad = cuda::plan_grad(rows, vocab_size, element_bytes, false, device);
  out << "\nrow_grad: ";
  tell(out, grad.share);
  out << "; " << grad.shared_bytes << " bytes of dynamic shared memory\nscale: ";
  tell(out, cuda::plan_scale(rows, vocab_size, element_bytes, device));
  const bool can_hold = element_bytes < 8 && vocab_size * element_bytes % 16 == 0;
  const auto fused =
      cuda::plan_fused(rows, vocab_size, element_bytes, state_bytes, can_hold, device);
  out << "\nfused: ";
  if (!fused.is_fused) {
    out << "row_stats, then row_grad in place";
  } else {
    out << (fused.cluster == 1 ? "one block"
                               : "a cluster of " + std::to_string(fused.cluster) + " blocks")
        << " for each row; " << fused.blocks << " blocks of " << fused.threads << " threads; "
        << fused.shared_bytes << " bytes of dynamic shared memory; ";
    if (fused.staged_chunks == fused.slice_chunks) {
      out << "the row is kept there";
    } else {
      out << fused.slice_chunks - fused.staged_chunks << " of " << fused.slice_chunks << " chunks "
          << (fused.holds ? "stay in registers" : "are read twice");
    }
  }
  return out.str();
}

}  // namespace

void register_launch_plan(Library& m) { m.impl("launch_plan", TORCH_BOX(&launch_plan)); }

}  // namespace llmloss::ops
