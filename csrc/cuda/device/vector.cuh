// Sixteen bytes of a row at a time, whatever the row's alignment.
#pragma once

#include "../../core/dtypes.h"
#include "simt.cuh"

namespace llmloss::cuda {

inline constexpr int vector_bytes = 16;

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

template <typename T>
struct Vector {
  static constexpr int size = vector_bytes / int(sizeof(T));
  T at[size];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_aligned(const T* at) {
  return bit_cast<Vector<T>>(simt::load_words(at));
}

template <typename T>
__device__ __forceinline__ void store_aligned(T* at, const Vector<T>& vector) {
  simt::store_words(at, bit_cast<simt::Words>(vector));
}

// Bytes from the multiple of 16 before.
__device__ __forceinline__ unsigned skew_of(const void* at) {
  return unsigned(reinterpret_cast<uintptr_t>(at)) % vector_bytes;
}

// The vector at an address with that skew, not 0, cut out of the two aligned ones that hold it.
// (Neighbours read the same ones: the second load finds them in L1.)
template <typename T>
__device__ __forceinline__ Vector<T> load_skewed(const T* at, unsigned skew) {
  const char* aligned = reinterpret_cast<const char*>(at) - skew;
  const simt::Words low = simt::load_words(aligned);
  const simt::Words high = simt::load_words(aligned + vector_bytes);
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = low.at[i];
    words[i + 4] = high.at[i];
  }
  // A shift by 0 to 14 bytes, as steps of 8, 4 and 2: constant indices stay in registers.
  if (skew & 8u) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (skew & 4u) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  if constexpr (sizeof(T) == 2) {
    if (skew & 2u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = words[i] >> 16 | words[i + 1] << 16;
    }
  }
  return bit_cast<Vector<T>>(simt::Words{{words[0], words[1], words[2], words[3]}});
}

// `count` elements in memory as whole aligned vectors, with single elements before and behind.
template <typename T>
struct Peeled {
  int head;  // singles before
  int vectors;
  int tail;     // where the singles behind begin
  int singles;  // before and behind

  __device__ __forceinline__ Peeled(const T* at, int count) {
    const int ahead = int((vector_bytes - skew_of(at)) % vector_bytes / sizeof(T));
    head = ahead < count ? ahead : count;
    vectors = (count - head) / Vector<T>::size;
    tail = head + vectors * Vector<T>::size;
    singles = head + (count - tail);
  }
  __device__ __forceinline__ int vector(int v) const { return head + v * Vector<T>::size; }
  __device__ __forceinline__ int single(int i) const { return i < head ? i : tail + (i - head); }

  // Calls on_vector and on_single with where they begin, this thread's share of all of them.
  template <typename OnVector, typename OnSingle>
  __device__ __forceinline__ void each(int thread, int threads, const OnVector& on_vector,
                                       const OnSingle& on_single) const {
    for (int v = thread; v < vectors; v += threads) on_vector(vector(v));
    for (int i = thread; i < singles; i += threads) on_single(single(i));
  }
};

// The columns first, first + 1, ... of a row, in global or shared memory.
template <typename T>
struct Columns {
  using V = Vector<T>;

  const T* data;  // of column `first`
  int first;
  int count;  // how many can be read

  __device__ __forceinline__ const T* at(int column) const { return data + (column - first); }
  __device__ __forceinline__ int end() const { return first + count; }
  __device__ __forceinline__ unsigned skew() const { return skew_of(data); }

  // Whether vectors can be read anywhere within [from, to) without a look at the ends: a skewed
  // load touches up to one vector before and behind.
  __device__ __forceinline__ bool is_inside(int from, int to) const {
    const int margin = skew() == 0 ? 0 : V::size;
    return from - margin >= first && to + margin <= end();
  }

  // The vector at a column; nothing but its own elements is read where others may not be.
  __device__ __forceinline__ V load(int column) const {
    if (is_inside(column, column + V::size)) {
      return skew_of(at(column)) == 0 ? load_aligned(at(column))
                                      : load_skewed(at(column), skew_of(at(column)));
    }
    V vector;
#pragma unroll
    for (int i = 0; i < V::size; ++i) vector.at[i] = *at(column + i);
    return vector;
  }
};

}  // namespace llmloss::cuda
