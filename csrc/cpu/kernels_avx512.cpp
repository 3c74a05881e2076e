// The CPU kernels compiled for AVX-512.
#if defined(__x86_64__)
// Include every foreign header before the target changes: inline functions of the standard library
// must not be compiled for instructions that the processor may lack.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// GCC 12 warns about undefined pass-through operands in its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#define LLMLOSS_ISA avx512
#include "vec_avx512.h"

#include "row_kernels.h"
#endif
