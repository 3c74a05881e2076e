// The kernels for float64 logits.
#include "launch.cuh"

template struct llmloss::cuda::RowKernels<double>;
