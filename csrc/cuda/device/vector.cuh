// Access to a row by vectors of sixteen bytes, whatever the row's alignment.
#pragma once

#include "../../core/dtypes.h"
#include "../../core/math.h"
#include "simt.cuh"

namespace llmloss::cuda {

inline constexpr int vector_bytes = 16;

LLMLOSS_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int clamp_of(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}

// Sixteen bytes as 32-bit words: elements are extracted only when they are used.
using simt::Arrival;
using simt::Words;

template <typename T>
struct Vector {
  static constexpr int size = vector_bytes / int(sizeof(T));
};

// Element i, converted to the arithmetic type.
template <typename T>
__device__ __forceinline__ real_t<T> element(const Words& words, int i) {
  if constexpr (sizeof(T) == 2) {
    return to_real(T{uint16_t(i % 2 == 0 ? words.at[i / 2] : words.at[i / 2] >> 16)});
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<float>(words.at[i]);
  } else {
    return bit_cast<double>(uint64_t{words.at[2 * i]} | uint64_t{words.at[2 * i + 1]} << 32);
  }
}

// Puts -inf in the place of element i; of none, if i is not in the vector.
template <typename T>
__device__ __forceinline__ void hide_element(Words& words, int i) {
  struct Elements {
    T at[Vector<T>::size];
  };
  Elements elements = bit_cast<Elements>(words);
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k) {
    if (k == i) from_real(-infinity<real_t<T>>(), elements.at[k]);
  }
  words = bit_cast<Words>(elements);
}

// A vector of numbers, rounded to the storage type.
template <typename T>
__device__ __forceinline__ Words packed(const real_t<T> (&x)[Vector<T>::size]) {
  if constexpr (sizeof(T) == 2) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = simt::pack_pair(x[2 * i], x[2 * i + 1], T{});
    return words;
  } else {
    struct Numbers {
      T at[Vector<T>::size];
    } numbers;
#pragma unroll
    for (int i = 0; i < Vector<T>::size; ++i) numbers.at[i] = x[i];
    return bit_cast<Words>(numbers);
  }
}

// The larger of two numbers; of a nan and a number, the number.
__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }

// The largest element of some vectors.
template <typename T, int n>
__device__ __forceinline__ real_t<T> largest(const Words (&vectors)[n]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t pair = vectors[0].at[0];
#pragma unroll
    for (int i = 1; i < 4 * n; ++i) pair = simt::max_pairs(pair, vectors[i / 4].at[i % 4], T{});
    const Words both{{pair, 0, 0, 0}};
    return larger(element<T>(both, 0), element<T>(both, 1));
  } else {
    real_t<T> max = element<T>(vectors[0], 0);
#pragma unroll
    for (int i = 1; i < n * Vector<T>::size; ++i) {
      max = larger(max, element<T>(vectors[i / Vector<T>::size], i % Vector<T>::size));
    }
    return max;
  }
}

// The offset of an address from the multiple of 16 before it, in bytes.
__device__ __forceinline__ unsigned skew_of(const void* at) {
  return unsigned(reinterpret_cast<uintptr_t>(at)) % vector_bytes;
}

// The first multiple of 16 bytes from an address on.
__device__ __forceinline__ void* vector_boundary(void* at) {
  return static_cast<char*>(at) + (vector_bytes - skew_of(at)) % vector_bytes;
}

// A vector of equal numbers.
template <typename T>
__device__ __forceinline__ Words filled(real_t<T> x) {
  struct Elements {
    T at[Vector<T>::size];
  } elements;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) from_real(x, elements.at[i]);
  return bit_cast<Words>(elements);
}

// Loads vectors, `stride` apart, that have the same skew, which is not 0, each from the two aligned
// vectors that contain it. (A lane's second load is its neighbour's first: it hits in L1.)
template <typename T, int n>
__device__ __forceinline__ void load_skewed(const T* at, int stride, unsigned skew,
                                            Words (&vectors)[n]) {
  uint32_t words[n][8];
#pragma unroll
  for (int v = 0; v < n; ++v) {
    const char* const aligned = reinterpret_cast<const char*>(at + v * stride) - skew;
    const Words low = simt::load_words(aligned);
    const Words high = simt::load_words(aligned + vector_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[v][i] = low.at[i];
      words[v][i + 4] = high.at[i];
    }
  }
  // Shifts by 0 to 14 bytes in steps of 8, 4 and 2: with constant indices, words stay in registers.
  if (skew & 8u) {
#pragma unroll
    for (int i = 0; i < 6 * n; ++i) words[i / 6][i % 6] = words[i / 6][i % 6 + 2];
  }
  if (skew & 4u) {
#pragma unroll
    for (int i = 0; i < 5 * n; ++i) words[i / 5][i % 5] = words[i / 5][i % 5 + 1];
  }
  if (sizeof(T) == 2 && (skew & 2u)) {
#pragma unroll
    for (int i = 0; i < 4 * n; ++i) {
      words[i / 4][i % 4] = simt::middle_half(words[i / 4][i % 4], words[i / 4][i % 4 + 1]);
    }
  }
#pragma unroll
  for (int v = 0; v < n; ++v) {
    vectors[v] = {{words[v][0], words[v][1], words[v][2], words[v][3]}};
  }
}

// Splits `count` elements in memory into whole aligned vectors, and single elements before and
// after.
template <typename T>
struct Peeled {
  int head;  // singles before
  int vectors;
  int tail;     // the first of the singles after
  int singles;  // before and after

  __device__ __forceinline__ Peeled(const T* at, int count) {
    const int ahead = int((vector_bytes - skew_of(at)) % vector_bytes / sizeof(T));
    head = ahead < count ? ahead : count;
    vectors = (count - head) / Vector<T>::size;
    tail = head + vectors * Vector<T>::size;
    singles = head + (count - tail);
  }
  __device__ __forceinline__ int vector(int v) const { return head + v * Vector<T>::size; }
  __device__ __forceinline__ int single(int i) const { return i < head ? i : tail + (i - head); }

  // Calls on_vector and on_single with the first index of each vector and single of this thread.
  template <typename OnVector, typename OnSingle>
  __device__ __forceinline__ void each(int thread, int threads, const OnVector& on_vector,
                                       const OnSingle& on_single) const {
    for (int v = thread; v < vectors; v += threads) on_vector(vector(v));
    for (int i = thread; i < singles; i += threads) on_single(single(i));
  }
};

// The columns first, first + 1, ... of a row, in global or shared memory. is_aligned: the first of
// them is known to lie at a multiple of 16 bytes.
template <typename T, bool is_aligned = false>
struct Columns {
  using V = Vector<T>;

  const T* data;  // of column `first`
  int first;
  int count;  // of the columns that can be read

  __device__ __forceinline__ const T* at(int column) const { return data + (column - first); }
  __device__ __forceinline__ int end() const { return first + count; }
  __device__ __forceinline__ unsigned skew() const { return is_aligned ? 0 : skew_of(data); }

  // Whether every vector within [from, to) can be loaded without checking bounds: a skewed load
  // touches up to one vector before and after.
  __device__ __forceinline__ bool is_inside(int from, int to) const {
    const int margin = skew() == 0 ? 0 : V::size;
    return from - margin >= first && to + margin <= end();
  }

  // Whether the vector at a column ends before column `to`, and can be loaded as such.
  __device__ __forceinline__ bool has_vector(int column, int to) const {
    return column + V::size <= to && is_inside(column, column + V::size);
  }

  // The vector at a column, with -inf from column `to` on, however it can be loaded.
  __device__ __forceinline__ Words load(int column, int to) const {
    if (has_vector(column, to)) {
      if (skew_of(at(column)) == 0) return simt::load_words(at(column));
      Words vector[1];
      load_skewed(at(column), 0, skew_of(at(column)), vector);
      return vector[0];
    }
    struct Elements {
      T at[V::size];
    } elements;
#pragma unroll
    for (int i = 0; i < V::size; ++i) {
      from_real(-infinity<real_t<T>>(), elements.at[i]);
      if (column + i < to) elements.at[i] = *at(column + i);
    }
    return bit_cast<Words>(elements);
  }
};

}  // namespace llmloss::cuda
