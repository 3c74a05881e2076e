// The operators on CUDA devices. Nothing here waits for the device, unless LLMLOSS_CHECK_TARGETS=1.
#include "torch_compat.h"  // before torch's

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>

#include "../cuda/launch/launch.h"
#include "library.h"
#include "operators.h"
#include "target_check.h"

namespace llmloss::ops {
namespace {

void check(int error) {
  STD_TORCH_CHECK(error == 0, "llmloss: CUDA error: ", cuda::error_message(error));
}

cuda::DeviceLimits limits_of(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, cuda::DeviceLimits> known;
  const std::lock_guard lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    cuda::DeviceLimits limits{};
    check(cuda::device_limits(device, limits));
    found = known.emplace(device, limits).first;
  }
  return found->second;
}

class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& input)
      : input_(input),
        guard_(input.get_device_index()),
        limits_(limits_of(input.get_device_index())),
        stream_(current_cuda_stream(input.get_device_index())) {}

  template <typename T>
  void check_targets(const Problem<T>& problem) const {
    const char* asked = std::getenv("LLMLOSS_CHECK_TARGETS");
    if (asked == nullptr || std::string_view(asked) != "1" || !problem.has_indices()) return;
    const Tensor on_host = torch::stable::to(
        problem.target, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    Targets targets = problem.rows.targets;
    if (on_host.numel() > 0) targets.data = on_host.data_ptr();
    check_targets_on_host(targets, on_host, problem.rows.rows, problem.rows.vocab_size);
  }

  template <typename T>
  void row_stats(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out) const {
    using Kernels = cuda::RowKernels<T>;
    cuda::check_columns(in.columns);
    const auto plan =
        cuda::plan_stats(in.rows, in.vocab_size, sizeof(T), Kernels::state_bytes, limits_);
    const Tensor workspace = new_tensor(input_, std::array{plan.workspace_bytes}, ScalarType::Byte);
    check(Kernels::row_stats(in, out, plan, workspace.data_ptr(), stream_));
  }

  template <typename T>
  void row_grad(const RowInputs<T>& in, const SavedStats<real_t<T>>& saved,
                const GradSource<real_t<T>>& source, const GradOutputs<T>& out) const {
    const auto plan =
        cuda::plan_grad(in.rows, in.columns, sizeof(T), out.grad_scale != nullptr, limits_);
    check(cuda::RowKernels<T>::row_grad(in, saved, source, out, plan, stream_));
  }

  template <typename T>
  void fused(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out,
             const GradSource<real_t<T>>& source, const GradOutputs<T>& grad) const {
    using Kernels = cuda::RowKernels<T>;
    cuda::check_columns(in.columns);
    const auto plan = Kernels::plan_fused(in, grad, limits_);
    if (plan.is_fused && Kernels::can_fuse(in, out, source, grad)) {
      check(Kernels::fused(in, out, source, grad, plan, stream_));
    } else {
      row_stats(in, out);
      row_grad(in, SavedStats<real_t<T>>::needed_by(source, out), source, grad);
    }
  }

  template <typename Real>
  void denominator(const LossRows<Real>& rows, Real* denominator) const {
    check(cuda::LossKernels<Real>::denominator(rows, denominator, stream_));
  }

  template <typename Real>
  void reduce_loss(const LossRows<Real>& rows, Reduction reduction, Real* loss) const {
    check(cuda::LossKernels<Real>::reduce_loss(rows, reduction, loss, stream_));
  }

  template <typename Real>
  void mean_loss(const LossRows<Real>& rows, Real* denominator, Real* loss) const {
    check(cuda::LossKernels<Real>::mean_loss(rows, denominator, loss, stream_));
  }

  template <typename Real>
  void sum(const Real* values, int64_t count, Real* total) const {
    check(cuda::LossKernels<Real>::sum(values, count, total, stream_));
  }

  template <typename Real>
  void merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out, Real* owners) const {
    check(cuda::LossKernels<Real>::merge_shards(in, out, owners, stream_));
  }

  template <typename T>
  void scale(T* x, const RowLayout& layout, int64_t rows, int64_t columns,
             const real_t<T>* factor) const {
    const auto plan = cuda::plan_scale(rows, columns, sizeof(T), limits_);
    check(cuda::RowKernels<T>::scale(x, layout, rows, columns, factor, plan, stream_));
  }

  Tensor new_gradient(const Tensor& input) const {
    return new_tensor(input, sizes_of(input), input.scalar_type());
  }

 private:
  Tensor input_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::DeviceLimits limits_;
  void* stream_;
};

}  // namespace

void register_cuda(Library& m) { register_operators<CudaBackend>(m); }

}  // namespace llmloss::ops
