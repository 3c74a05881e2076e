// The kernels for float16 logits.
#include "launch.cuh"

template struct llmloss::cuda::RowKernels<llmloss::Half>;
