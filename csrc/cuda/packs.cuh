// Packs of numbers in and out of memory, and what the epilogue computes of one.
#pragma once

#include "cut.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mrvae::cuda::memory {

template <class S, int V>
__device__ __forceinline__ Pack<S, V> read(const S* from) {
  return *reinterpret_cast<const Pack<S, V>*>(from);
}

template <class S, int V>
__device__ __forceinline__ void write(S* to, const Pack<S, V>& pack) {
  *reinterpret_cast<Pack<S, V>*>(to) = pack;
}

// V parameters in a row; 16 bytes at a time where the pointer is aligned
template <class T, int V>
__device__ __forceinline__ void read_values(const T* from, T (&values)[V], bool wide) {
  constexpr int step = V % pack_size<T> == 0 ? pack_size<T> : 1;
  if (step > 1 && wide) {
#pragma unroll
    for (int j = 0; j < V; j += step) {
      const Pack<T, step> pack = read<T, step>(from + j);
#pragma unroll
      for (int k = 0; k < step; ++k) values[j + k] = pack.values[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = from[j];
  }
}

template <class T, int V>
__device__ __forceinline__ void write_values(T* to, const T (&values)[V], bool wide) {
  constexpr int step = V % pack_size<T> == 0 ? pack_size<T> : 1;
  if (step > 1 && wide) {
#pragma unroll
    for (int j = 0; j < V; j += step) {
      Pack<T, step> pack;
#pragma unroll
      for (int k = 0; k < step; ++k) pack.values[k] = values[j + k];
      write<T, step>(to + j, pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = values[j];
  }
}

// The numbers rounded to storage; on a GPU two 16-bit ones in one instruction.
template <class S, class T, int V>
__device__ __forceinline__ Pack<S, V> rounded(const T (&values)[V]) {
  Pack<S, V> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2 && V % 2 == 0) {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      if constexpr (std::is_same_v<S, Half>) {
        const __half2 pair = __floats2half2_rn(values[j], values[j + 1]);
        std::memcpy(pack.values + j, &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[j], values[j + 1]);
        std::memcpy(pack.values + j, &pair, 4);
      }
    }
    return pack;
  }
#endif
#pragma unroll
  for (int j = 0; j < V; ++j) store(pack.values[j], values[j]);
  return pack;
}

// ---- the mathematics of a pack ------------------------------------------------------------------------------------

// g, b and t: of each element of a pack, or with n = 1 of all of them
template <class T, int n>
struct Constants {
  T g[n], b[n], t[n];
};

template <Activation kind, class T, int V>
__device__ __forceinline__ void activate_each(T (&z)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = activate<kind>(z[j]);
}

template <Activation kind, class T, int V>
__device__ __forceinline__ void slope_each(T (&z)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = activation_slope<kind>(z[j]);
}

// One branch a pack, which all threads take: a template parameter would make seven times as many kernels.
template <class T, int V>
__device__ __forceinline__ void activate_all(T (&z)[V], Activation activation) {
  switch (activation) {
    case Activation::None: break;
    case Activation::Relu: activate_each<Activation::Relu>(z); break;
    case Activation::Silu: activate_each<Activation::Silu>(z); break;
    case Activation::Gelu: activate_each<Activation::Gelu>(z); break;
    case Activation::Tanh: activate_each<Activation::Tanh>(z); break;
    case Activation::LeakyRelu: activate_each<Activation::LeakyRelu>(z); break;
    case Activation::Elu: activate_each<Activation::Elu>(z); break;
  }
}

template <class T, int V>
__device__ __forceinline__ void slope_all(T (&z)[V], Activation activation) {
  switch (activation) {
    case Activation::None: slope_each<Activation::None>(z); break;
    case Activation::Relu: slope_each<Activation::Relu>(z); break;
    case Activation::Silu: slope_each<Activation::Silu>(z); break;
    case Activation::Gelu: slope_each<Activation::Gelu>(z); break;
    case Activation::Tanh: slope_each<Activation::Tanh>(z); break;
    case Activation::LeakyRelu: slope_each<Activation::LeakyRelu>(z); break;
    case Activation::Elu: slope_each<Activation::Elu>(z); break;
  }
}

// `plain`: y = g u, without bias, shift and activation, as the fold needs it
template <bool plain, class S, int V, class T, int n>
__device__ __forceinline__ Pack<S, V> forward_pack(const Pack<S, V>& u, const Constants<T, n>& with,
                                                   Activation activation) {
  T z[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int k = n == 1 ? 0 : j;
    z[j] = plain ? with.g[k] * load(u.values[j]) : with.g[k] * (load(u.values[j]) + with.b[k]) + with.t[k];
  }
  if constexpr (!plain) activate_all(z, activation);
  return rounded<S>(z);
}

// Returns du, and calls each(j, dz, product) with dz and dz (u + b) of elements j and next ones: four at a time, as the
// registers do not hold more.
template <bool plain, class S, int V, class T, int n, class Each>
__device__ __forceinline__ Pack<S, V> backward_pack(const Pack<S, V>& dy, const Pack<S, V>& u,
                                                    const Constants<T, n>& with, Activation activation,
                                                    const Each& each) {
  constexpr int part = V < 4 ? V : 4;
  Pack<S, V> result;
#pragma unroll
  for (int first = 0; first < V; first += part) {
    T dz[part], product[part], du[part];
#pragma unroll
    for (int j = 0; j < part; ++j) {
      const int k = n == 1 ? 0 : first + j;
      product[j] = plain ? load(u.values[first + j]) : load(u.values[first + j]) + with.b[k];
      if constexpr (!plain) dz[j] = with.g[k] * product[j] + with.t[k];
    }
    if constexpr (!plain) slope_all(dz, activation);
#pragma unroll
    for (int j = 0; j < part; ++j) {
      dz[j] = plain ? load(dy.values[first + j]) : load(dy.values[first + j]) * dz[j];
      product[j] *= dz[j];
      du[j] = with.g[n == 1 ? 0 : first + j] * dz[j];
    }
    const Pack<S, part> some = rounded<S>(du);
#pragma unroll
    for (int j = 0; j < part; ++j) result.values[first + j] = some.values[j];
    each(first, dz, product);
  }
  return result;
}

}  // namespace mrvae::cuda::memory
