// The CPU kernels: one body per operation, compiled once per instruction set, chosen at run time.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "../core/params.h"

namespace llmloss::cpu {

// Of those that a processor has, the last is the best. llmloss_ext/cli/info.py has the same names.
enum class Isa : int { portable, avx2, avx512, avx512_bf16, neon };
inline constexpr std::array all_isas = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16,
                                        Isa::neon};

constexpr std::string_view name_of(Isa isa) {
  constexpr std::string_view names[] = {"portable", "avx2", "avx512", "avx512_bf16", "neon"};
  return names[int(isa)];
}

// Whether this processor has it.
bool has_isa(Isa isa);

// The best instruction set of this processor.
Isa detected_isa();

// The one to use: that which LLMLOSS_CPU_ISA names, or the best where the processor lacks it.
Isa active_isa();

// Each kernel processes the `count` rows whose indices are in `rows`. A row's bits depend neither
// on the other rows nor on the thread that computes it.
template <typename T>
struct Kernels {
  // Reads each row once and writes the requested statistics.
  void (*row_stats)(const RowInputs<T>&, const RowOutputs<real_t<T>>&, const int64_t* rows,
                    int64_t count);
  // Reads each row once and writes its gradient.
  void (*row_grad)(const RowInputs<T>&, const SavedStats<real_t<T>>&, const GradSource<real_t<T>>&,
                   const GradOutputs<T>&, const int64_t* rows, int64_t count);
  // Both at once: one read and one write of memory if a row fits in the L2 cache.
  void (*fused)(const RowInputs<T>&, const RowOutputs<real_t<T>>&, const GradSource<real_t<T>>&,
                const GradOutputs<T>&, const int64_t* rows, int64_t count);
  // data[i] *= factor.
  void (*scale)(T* data, int64_t count, real_t<T> factor);
};

template <typename T>
const Kernels<T>& kernels(Isa isa);

}  // namespace llmloss::cpu
