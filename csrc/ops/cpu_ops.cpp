// The operators on the CPU.
#include "../cpu/kernels.h"
#include "library.h"
#include "operators.h"
#include "target_check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmloss::ops {
namespace {

// The rows, ignored ones last, so that threads get equal shares of the work wherever the ignored
// rows are.
struct RowOrder {
  template <typename T>
  explicit RowOrder(const RowInputs<T>& in) : rows(size_t(in.rows)) {
    int64_t front = 0, back = in.rows;
    for (int64_t row = 0; row < in.rows; ++row) {
      rows[size_t(RowTarget(in.targets, row).is_ignored() ? --back : front++)] = row;
    }
    active = front;
  }

  std::vector<int64_t> rows;
  int64_t active = 0;
};

// Requests huge pages for a contiguous tensor that has not been written yet. In hundreds of
// megabytes of fresh memory, page faults cost more than arithmetic; huge pages avoid most of them.
void prefer_huge_pages(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * t.element_size();
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct CpuBackend {
  explicit CpuBackend(const Tensor&) {}

  template <typename T>
  void check_targets(const Problem<T>& problem) const {
    const RowInputs<T>& in = problem.rows;
    check_targets_on_host(in.targets, problem.target, in.rows, in.vocab_size);
  }

  template <typename T>
  void row_stats(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out) const {
    const auto& kernels = cpu::kernels<T>(cpu::active_isa());
    for_rows(in,
             [&](const int64_t* rows, int64_t count) { kernels.row_stats(in, out, rows, count); });
  }

  template <typename T>
  void row_grad(const RowInputs<T>& in, const SavedStats<real_t<T>>& saved,
                const GradSource<real_t<T>>& source, const GradOutputs<T>& out) const {
    const auto& kernels = cpu::kernels<T>(cpu::active_isa());
    for_rows(in, [&](const int64_t* rows, int64_t count) {
      kernels.row_grad(in, saved, source, out, rows, count);
    });
  }

  template <typename T>
  void fused(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out,
             const GradSource<real_t<T>>& source, const GradOutputs<T>& grad) const {
    const auto& kernels = cpu::kernels<T>(cpu::active_isa());
    for_rows(in, [&](const int64_t* rows, int64_t count) {
      kernels.fused(in, out, source, grad, rows, count);
    });
  }

  template <typename Real>
  void denominator(const LossRows<Real>& rows, Real* denominator) const {
    double shares = 0, weights = 0;
    const int64_t counted = rows.num_items == nullptr ? rows.rows : 0;
    for (int64_t row = 0; row < counted; ++row) {
      const auto read = rows.read(row);
      shares += rows.share(read);
      weights += rows.weight(read);
    }
    rows.write_denominator(shares, weights, denominator);
  }

  template <typename Real>
  void reduce_loss(const LossRows<Real>& rows, Reduction reduction, Real* loss) const {
    double sum = 0;
    for (int64_t row = 0; row < rows.rows; ++row) {
      const Real row_loss = rows.loss(rows.read(row));
      if (reduction == Reduction::none) loss[row] = row_loss;
      sum += row_loss;
    }
    if (reduction == Reduction::none) return;
    *loss = Real(sum / rows.denominator.value());
  }

  template <typename Real>
  void mean_loss(LossRows<Real> rows, Real* denominator, Real* loss) const {
    this->denominator(rows, denominator);
    rows.denominator = {denominator};
    reduce_loss(rows, Reduction::mean, loss);
  }

  template <typename Real>
  void sum(const Real* values, int64_t count, Real* total) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    *total = Real(sum);
  }

  template <typename Real>
  void merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out, Real* owners) const {
    for (int64_t row = 0; row < in.rows; ++row) llmloss::merge_shards(in, out, owners, row);
  }

  template <typename T>
  void scale(T* x, const RowLayout& layout, int64_t rows, int64_t columns,
             const real_t<T>* factor) const {
    if (*factor == real_t<T>(1)) return;
    const auto& kernels = cpu::kernels<T>(cpu::active_isa());
    torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.scale(x + layout.offset(row), columns, *factor);
      }
    });
  }

  // A contiguous tensor of the input's shape.
  Tensor new_gradient(const Tensor& input) const {
    Tensor grad = new_tensor(input, sizes_of(input), input.scalar_type());
    prefer_huge_pages(grad);
    return grad;
  }

 private:
  // The fewest rows for a thread: below some ten thousand columns, waking a thread costs more than
  // it saves.
  static int64_t grain(int64_t columns) { return 1 + 32768 / std::max<int64_t>(columns, 1); }

  template <typename T, typename Run>
  static void for_rows(const RowInputs<T>& in, const Run& run) {
    const RowOrder order(in);
    const int64_t* rows = order.rows.data();
    const auto in_parallel = [&](int64_t first, int64_t last) {
      if (first == last) return;
      torch::stable::parallel_for(first, last, grain(in.columns), [&](int64_t begin, int64_t end) {
        run(rows + begin, end - begin);
      });
    };
    in_parallel(0, order.active);
    in_parallel(order.active, in.rows);
  }
};

int64_t cpu_isa() { return int64_t(cpu::active_isa()); }

}  // namespace

void register_cpu(Library& m) {
  register_operators<CpuBackend>(m);
  m.impl("prefer_huge_pages_", TORCH_BOX(&prefer_huge_pages));
}

void register_cpu_isa(Library& m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace llmloss::ops
