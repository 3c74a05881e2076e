// The kernels for bfloat16 logits.
#include "launch.cuh"

template struct llmloss::cuda::RowKernels<llmloss::BFloat16>;
