// The inner loops of the epilogue, forward and backward, over memory that lies in one piece. `Parameters` says whether g,
// b and t change from element to element (the channel is the fastest axis) or are constants (one channel's plane).
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {

constexpr std::int64_t chunk = 512;  // elements of z and dz kept in the first-level cache

template <class T>
struct Vectors {
  const T *gate, *bias, *shift;
  MRVAE_HOST_DEVICE Vectors from(std::int64_t i) const { return {gate + i, bias + i, shift + i}; }
  MRVAE_HOST_DEVICE T g(std::int64_t i) const { return gate[i]; }
  MRVAE_HOST_DEVICE T b(std::int64_t i) const { return bias[i]; }
  MRVAE_HOST_DEVICE T t(std::int64_t i) const { return shift[i]; }
};

template <class T>
struct Constants {
  T gate, bias, shift;
  MRVAE_HOST_DEVICE Constants from(std::int64_t) const { return *this; }
  MRVAE_HOST_DEVICE T g(std::int64_t) const { return gate; }
  MRVAE_HOST_DEVICE T b(std::int64_t) const { return bias; }
  MRVAE_HOST_DEVICE T t(std::int64_t) const { return shift; }
};

template <Activation kind, class T>
MRVAE_HOST_DEVICE void activate_loop(T* z, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) z[i] = activate<kind>(z[i]);
}

template <Activation kind, class T>
MRVAE_HOST_DEVICE void slope_loop(const T* z, T* d, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) d[i] *= activation_slope<kind>(z[i]);
}

template <class T>
MRVAE_CLONES void activate_chunk(Activation activation, T* z, std::int64_t n) {
  switch (activation) {
    case Activation::Silu: return activate_loop<Activation::Silu>(z, n);
    case Activation::Gelu: return activate_loop<Activation::Gelu>(z, n);
    case Activation::Tanh: return activate_loop<Activation::Tanh>(z, n);
    case Activation::Elu: return activate_loop<Activation::Elu>(z, n);
    default: return;
  }
}

template <class T>
MRVAE_CLONES void slope_chunk(Activation activation, const T* z, T* d, std::int64_t n) {
  switch (activation) {
    case Activation::Silu: return slope_loop<Activation::Silu>(z, d, n);
    case Activation::Gelu: return slope_loop<Activation::Gelu>(z, d, n);
    case Activation::Tanh: return slope_loop<Activation::Tanh>(z, d, n);
    case Activation::Elu: return slope_loop<Activation::Elu>(z, d, n);
    default: return;
  }
}

// None, ReLU and leaky ReLU cost less than another pass over a chunk: they run inside the loops over memory.
template <Activation kind, class S, class T, class Parameters>
MRVAE_HOST_DEVICE void forward_loop(const S* u, S* y, std::int64_t n, const Parameters& p) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(y[i], activate<kind>(T(p.g(i) * (load(u[i]) + p.b(i)) + p.t(i))));
}

// y = activation(g * (u + b) + t) over n elements
template <class S, class T, class Parameters>
MRVAE_CLONES void forward_run(const S* u, S* y, std::int64_t n, Parameters with, Activation activation) {
  if (activation == Activation::None) return forward_loop<Activation::None, S, T>(u, y, n, with);
  if (activation == Activation::Relu) return forward_loop<Activation::Relu, S, T>(u, y, n, with);
  if (activation == Activation::LeakyRelu) return forward_loop<Activation::LeakyRelu, S, T>(u, y, n, with);
  T z[chunk];
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t size = std::min(chunk, n - begin);
    const Parameters p = with.from(begin);
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) z[i] = p.g(i) * (load(u[begin + i]) + p.b(i)) + p.t(i);
    activate_chunk(activation, z, size);
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) store(y[begin + i], z[i]);
  }
}

// ReLU in a backward pass that is given y for u: z = g y would underflow, and has another sign for g < 0.
constexpr Activation relu_of_result = Activation(7);

template <Activation kind, class S, class T, class Parameters>
MRVAE_HOST_DEVICE void preactivation_loop(const S* grad, const S* u, std::int64_t n, const Parameters& p, T* d) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    d[i] = load(grad[i]) * activation_slope<kind>(T(p.g(i) * (load(u[i]) + p.b(i)) + p.t(i)));
  }
}

// d = dy * activation'(g * (u + b) + t) for one chunk
template <class S, class T, class Parameters>
MRVAE_HOST_DEVICE void preactivation_gradient(const S* grad, const S* u, std::int64_t n, const Parameters& p,
                                              Activation activation, T* d) {
  if (activation == Activation::Relu) return preactivation_loop<Activation::Relu>(grad, u, n, p, d);
  if (activation == relu_of_result) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) d[i] = load(u[i]) > T(0) ? T(load(grad[i])) : T(0);
    return;
  }
  if (activation == Activation::LeakyRelu) return preactivation_loop<Activation::LeakyRelu>(grad, u, n, p, d);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) d[i] = load(grad[i]);
  if (activation == Activation::None) return;
  T z[chunk];
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) z[i] = p.g(i) * (load(u[i]) + p.b(i)) + p.t(i);
  slope_chunk(activation, z, d, n);
}

// du = g * d, and adds d and d * (u + b) to the sums of each element's channel. grad_u or the sums may be nullptr.
template <class S, class T>
MRVAE_CLONES void backward_run(const S* grad, const S* u, std::int64_t n, Vectors<T> with, Activation activation,
                               S* grad_u, T* sum, T* dot) {
  T d[chunk];
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t size = std::min(chunk, n - begin);
    const Vectors<T> p = with.from(begin);
    const S* values = u + begin;
    preactivation_gradient(grad + begin, values, size, p, activation, d);
    if (grad_u != nullptr) {
      S* target = grad_u + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) store(target[i], p.g(i) * d[i]);
    }
    if (sum != nullptr) {
      T *s = sum + begin, *q = dot + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) {
        s[i] += d[i];
        q[i] += d[i] * (load(values[i]) + p.b(i));
      }
    }
  }
}

// The same for one channel's plane: sum and dot are one number each, or nullptr.
template <class S, class T>
MRVAE_CLONES void backward_plane(const S* grad, const S* u, std::int64_t n, Constants<T> with, Activation activation,
                                 S* grad_u, T* sum, T* dot) {
  T d[chunk];
  double total = 0, total_dot = 0;
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t size = std::min(chunk, n - begin);
    const S* values = u + begin;
    preactivation_gradient(grad + begin, values, size, with, activation, d);
    if (grad_u != nullptr) {
      S* target = grad_u + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) store(target[i], with.gate * d[i]);
    }
    if (sum != nullptr) {
      T s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
      for (std::int64_t i = 0; i < size; ++i) {
        s += d[i];
        q += d[i] * (load(values[i]) + with.bias);
      }
      total += s;
      total_dot += q;
    }
  }
  if (sum != nullptr) {
    *sum = T(total);
    *dot = T(total_dot);
  }
}

// Adds the sums over each channel's `inner` neighbours: values is (repeats, channels, inner).
template <class T>
MRVAE_CLONES void fold_sums(const T* values, std::int64_t repeats, std::int64_t channels, std::int64_t inner, T* target) {
  for (std::int64_t k = 0; k < repeats; ++k) {
    for (std::int64_t c = 0; c < channels; ++c, values += inner) target[c] += short_sum(values, inner);
  }
}

}  // namespace mrvae::cpu
