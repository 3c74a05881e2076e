// The kernels over rows of statistics, which are float or double for any type of logits.
#include "launch.cuh"

template struct llmloss::cuda::LossKernels<float>;
template struct llmloss::cuda::LossKernels<double>;
