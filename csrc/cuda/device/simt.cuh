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

// Says when a copy to shared memory is complete; lies there, too, and is used once.
using Arrival = uint64_t;

// The warp starts to copy whole vectors of sixteen bytes from global to shared memory. All lanes
// call it with the same arguments. `arrival` can be waited for once the threads that wait know that
// this has been called: after a barrier.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// One instruction, by one lane.
__device__ __forceinline__ void start_copy(void* shared, const void* global, int bytes,
                                           Arrival* arrival) {
  if (lane() != 0) return;
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  const auto told = unsigned(__cvta_generic_to_shared(arrival));
  asm volatile(
      "mbarrier.init.shared.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(told),
      "r"(bytes)
      : "memory");
  if (bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(global), "r"(bytes), "r"(told)
      : "memory");
}
#else
__device__ __forceinline__ void start_copy(void* shared, const void* global, int bytes,
                                           Arrival* arrival) {
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  const auto told = unsigned(__cvta_generic_to_shared(arrival));
  if (lane() == 0) asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(told) : "memory");
  warp_sync();
#pragma unroll 4
  for (int at = int(lane()) * 16; at < bytes; at += 32 * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at),
                 "l"(static_cast<const char*>(global) + at)
                 : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(told) : "memory");
}
#endif
__device__ __forceinline__ void wait_for(Arrival* arrival) {
  const auto told = unsigned(__cvta_generic_to_shared(arrival));
  asm volatile(
      "{\n"
      ".reg .pred arrived;\n"
      "waiting:\n"
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared.b64 arrived, [%0], 0;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 arrived, [%0], 0;\n"
#endif
      "@!arrived bra waiting;\n"
      "}" ::"r"(told)
      : "memory");
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

// 2^x with a relative error of about 2^-22: accurate enough for 16-bit types. Results below the
// smallest normal number are 0; __expf handles them with three more instructions.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// tanh x with an absolute error of about 2^-22. Rounded to 16 bits, the hardware's own tanh would
// be seen.
__device__ __forceinline__ float fast_tanh(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;"
      : "=f"(inverse)
      : "f"(fast_exp2(2.8853900817779268f * x) + 1.0f));
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
