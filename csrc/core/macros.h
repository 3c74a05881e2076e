// Macros for code that the host, CUDA kernels and their emulator share.
#pragma once

// LLMLOSS_HD marks a function that all of them can call. LLMLOSS_UNROLL unrolls a loop over a small
// array: with constant indices, a kernel keeps the array in registers.
#if defined(__CUDACC__)
#define LLMLOSS_HD __host__ __device__ __forceinline__
#define LLMLOSS_UNROLL _Pragma("unroll")
#else
// always_inline: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// made for AVX-512 must never be the one that the linker hands to the portable kernels.
#define LLMLOSS_HD inline __attribute__((always_inline))
#define LLMLOSS_UNROLL
#endif
