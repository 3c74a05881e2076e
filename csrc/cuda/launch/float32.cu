// The kernels for float32 logits.
#include "launch.cuh"

template struct llmloss::cuda::RowKernels<float>;
