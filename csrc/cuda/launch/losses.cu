// The kernels over rows of statistics, which are float or double whatever the logits are.
#include "launch.cuh"

template struct llmloss::cuda::LossKernels<float>;
template struct llmloss::cuda::LossKernels<double>;
