// The CPU kernels compiled for AVX-512 with its BF16 conversion, which takes a third off the fused
// bfloat16 kernel.
#if defined(__x86_64__)
// Everything from outside is included before the target changes: inline functions of the standard
// library must not be compiled for more than the processor at hand.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// GCC 12 takes the undefined pass-through operands of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")
#define LLMLOSS_ISA avx512_bf16
#define LLMLOSS_AVX512_BF16
#include "vec_avx512.h"

#include "row_kernels.h"
#endif
