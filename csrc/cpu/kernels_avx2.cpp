// The CPU kernels compiled for AVX2, FMA and F16C.
#if defined(__x86_64__)
// Include every foreign header before the target changes: inline functions of the standard library
// must not be compiled for instructions that the processor may lack.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#define LLMLOSS_ISA avx2
#include "vec_avx2.h"

#include "row_kernels.h"
#endif
