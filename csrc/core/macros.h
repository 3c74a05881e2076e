// What the host, CUDA kernels and their emulator share.
#pragma once

// LLMLOSS_HD marks a function that all of them call. LLMLOSS_UNROLL stands before a loop over an
// array that is to lie in a kernel's registers: every index must be a constant.
#if defined(__CUDACC__)
#define LLMLOSS_HD __host__ __device__ __forceinline__
#define LLMLOSS_UNROLL _Pragma("unroll")
#else
// always_inline: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// made for AVX-512 must never be the one that the linker hands to the portable kernels.
#define LLMLOSS_HD inline __attribute__((always_inline))
#define LLMLOSS_UNROLL
#endif
