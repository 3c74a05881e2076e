// The CPU kernels compiled for NEON, which every AArch64 processor has.
#if defined(__aarch64__)
#include "kernels.h"

#define LLMLOSS_ISA neon
#include "vec_neon.h"

#include "row_kernels.h"
#endif
