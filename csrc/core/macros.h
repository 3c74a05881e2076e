// LLMLOSS_HD marks what the host, CUDA kernels and their emulator share.
#pragma once

#if defined(__CUDACC__)
#define LLMLOSS_HD __host__ __device__ __forceinline__
#else
// always_inline: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// made for AVX-512 must never be the one that the linker hands to the portable kernels.
#define LLMLOSS_HD inline __attribute__((always_inline))
#endif
