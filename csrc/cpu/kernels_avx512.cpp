// The CPU kernels compiled for AVX-512.
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

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#define LLMLOSS_ISA avx512
#include "vec_avx512.h"

#include "row_kernels.h"
#endif
