// CUDA's built-ins under names of our own; kernels use CUDA through these alone. With LLMLOSS_SIMT
// defined, the emulator of tests/simt provides the same names.
#pragma once

#include <cstdint>

#include "../../core/dtypes.h"

#if defined(LLMLOSS_SIMT)
#include "simt_emulator.h"
#else

namespace llmloss::simt {

__device__ __forceinline__ unsigned thread_index() { return threadIdx.x; }
__device__ __forceinline__ unsigned block_threads() { return blockDim.x; }
__device__ __forceinline__ unsigned block_index_x() { return blockIdx.x; }
__device__ __forceinline__ unsigned grid_x() { return gridDim.x; }
__device__ __forceinline__ unsigned lane() { return threadIdx.x % 32; }
__device__ __forceinline__ unsigned warp_index() { return threadIdx.x / 32; }

// A barrier for all threads of the block; what they wrote before it can be read after it.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// The same for the threads of a warp.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// The value of lane ^ mask. All 32 lanes must call it.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, int(mask));
}

// The dynamic shared memory of the launch; 16-byte aligned.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 llmloss_dynamic_shared[];
  return reinterpret_cast<T*>(llmloss_dynamic_shared);
}

// Thread-block clusters, from compute capability 9.0 on; before that, every cluster is one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_blocks() { return __clusterSizeInBlocks(); }
// A barrier for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  if (cluster_blocks() == 1) return block_sync();
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// A barrier in two halves, with room for work in between. After it, all threads of the cluster have
// started; what they wrote before need not be visible.
__device__ __forceinline__ void cluster_arrive() {
  if (cluster_blocks() > 1) __cluster_barrier_arrive_relaxed();
}
__device__ __forceinline__ void cluster_wait() {
  if (cluster_blocks() > 1) __cluster_barrier_wait();
}
// The address in the block of that rank that corresponds to `mine` in this block.
template <typename T>
__device__ __forceinline__ T* peer_shared(T* mine, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_blocks() { return 1; }
__device__ __forceinline__ void cluster_sync() { block_sync(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ T* peer_shared(T* mine, unsigned) {
  return mine;
}
#endif

// Starts to copy sixteen bytes to shared memory; both addresses are multiples of 16. The copy is
// complete once this thread has waited for its group.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// What a thread has started since its last call belongs to one group.
__device__ __forceinline__ void close_group_of_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups but the last `later` (or fewer). The number is part of the instruction.
__device__ __forceinline__ void wait_for_copies(int later) {
#define LLMLOSS_WAIT(n)                                       \
  case n:                                                     \
    asm volatile("cp.async.wait_group " #n ";" ::: "memory"); \
    break
  switch (later) {
    LLMLOSS_WAIT(0);
    LLMLOSS_WAIT(1);
    LLMLOSS_WAIT(2);
    LLMLOSS_WAIT(3);
    LLMLOSS_WAIT(4);
    LLMLOSS_WAIT(5);
    LLMLOSS_WAIT(6);
    LLMLOSS_WAIT(7);
    default:
      asm volatile("cp.async.wait_group %0;" ::"n"(8) : "memory");
  }
#undef LLMLOSS_WAIT
}

// Loads and stores sixteen bytes in one instruction; the address is a multiple of 16.
struct alignas(16) Words {
  uint32_t at[4];
};
__device__ __forceinline__ Words load_words(const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}
__device__ __forceinline__ void store_words(void* to, const Words& words) {
  *static_cast<uint4*>(to) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
}

// e^x with a relative error of about 2^-21 near 0, growing with |x|: accurate enough for 16-bit
// types. Results below the smallest normal number are 0; __expf handles them with three more
// instructions.
__device__ __forceinline__ float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

// tanh x with an absolute error of about 2^-22. Rounded to 16 bits, the hardware's own tanh would
// be seen.
__device__ __forceinline__ float fast_tanh(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fast_exp(2.0f * x) + 1.0f));
  return ::fmaf(-2.0f, inverse, 1.0f);
}

// The larger of each of two pairs of 16-bit numbers; of a nan and a number, the number.
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b, BFloat16) {
  return bit_cast<uint32_t>(__hmax2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
}
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b, Half) {
  return bit_cast<uint32_t>(__hmax2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}

// The upper half of the first word, then the lower half of the second.
__device__ __forceinline__ uint32_t middle_half(uint32_t low, uint32_t high) {
  return __funnelshift_r(low, high, 16);
}

// Two numbers rounded to 16 bits, to nearest even.
__device__ __forceinline__ uint32_t pack_pair(float low, float high, BFloat16) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, Half) {
  return bit_cast<uint32_t>(__floats2half2_rn(low, high));
}

}  // namespace llmloss::simt
#endif
