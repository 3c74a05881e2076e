// A small kernel that sums exponentials as ours do, and faults planted in it: tests/
// test_machine_code.py wants each found. It is compiled only, never run.
#include <cstdint>

enum Fault {
  none,
  scalar_loads,
  local_array,
  dependent_load,
  more_mufu,
  other_order,
  more_branches,
  more_instructions,
  one_vector,
  narrow_store,
};

constexpr int vectors = 4, width = 4;

__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <int fault>
__global__ void __launch_bounds__(256) sum_kernel(const float* __restrict__ x, float* sums,
                                                  const int* starts, int batches, int limit) {
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (fault == dependent_load) x += starts[starts[blockIdx.x]];
  float sum = 0;
  float last[8];
  constexpr int count = fault == one_vector ? 1 : vectors;
#pragma unroll 1
  for (int batch = 0; batch < batches; ++batch) {
    const float* at = x + (size_t(batch) * blockDim.x + threadIdx.x) * width * count;
    float v[vectors * width];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (fault == scalar_loads) {
#pragma unroll
        for (int e = 0; e < width; ++e)
          v[i * width + e] = ((volatile const float*)at)[i * width + e];
      } else {
        const float4 loaded = reinterpret_cast<const float4*>(at)[i];
        v[i * width] = loaded.x, v[i * width + 1] = loaded.y;
        v[i * width + 2] = loaded.z, v[i * width + 3] = loaded.w;
      }
    }
    float of[vectors] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int e = 0; e < width; ++e) {
        float y = v[i * width + e];
        if (fault == more_instructions) y = float(int(y * 3.0f) % 7) - y;
        if (fault == more_branches)
          asm volatile(
              "{.reg .pred p; setp.gt.f32 p, %0, 0f41200000; @p bra.uni L%=; membar.cta; L%=: }" ::
                  "f"(y));
        of[i] += exp2_of(y);
      }
    }
    if (fault == more_mufu) of[0] += rsqrtf(v[0]);
    if (fault == local_array) last[(batch + limit) & 7] = of[0];
    sum += fault == other_order ? ((of[0] + of[1]) + of[2]) + of[3]
                                : (of[0] + of[1]) + (of[2] + of[3]);
  }
  if (fault == local_array) sum += last[limit & 7];
  sums[thread] = sum;
}

template <int fault>
__global__ void __launch_bounds__(256) write_kernel(const float* x, float* out, int batches) {
#pragma unroll 1
  for (int batch = 0; batch < batches; ++batch) {
    const size_t at = (size_t(batch) * blockDim.x + threadIdx.x) * vectors;
    const float4* from = reinterpret_cast<const float4*>(x) + at;
    float4 v[vectors];
#pragma unroll
    for (int i = 0; i < vectors; ++i) v[i] = from[i];
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const float4 e{exp2_of(v[i].x), exp2_of(v[i].y), exp2_of(v[i].z), exp2_of(v[i].w)};
      reinterpret_cast<float4*>(out)[at + i] = e;
      if (fault == narrow_store) *(volatile float*)(out - 4 * at - i - 1) = e.x;
    }
  }
}

template __global__ void sum_kernel<none>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<scalar_loads>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<local_array>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<dependent_load>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<more_mufu>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<other_order>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<more_branches>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<more_instructions>(const float*, float*, const int*, int, int);
template __global__ void sum_kernel<one_vector>(const float*, float*, const int*, int, int);
template __global__ void write_kernel<none>(const float*, float*, int);
template __global__ void write_kernel<narrow_store>(const float*, float*, int);
