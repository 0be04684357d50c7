// Activations and their slopes with the function known at run time: one branch for several numbers.
#pragma once

#include "runtime.h"

namespace mrvae::cuda {

template <Activation kind, int count>
__device__ __forceinline__ void activate_each(float (&z)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = activate<kind>(z[i]);
}

template <int count>
__device__ __forceinline__ void activate_all(float (&z)[count], Activation activation) {
  switch (activation) {
    case Activation::Relu: return activate_each<Activation::Relu>(z);
    case Activation::Silu: return activate_each<Activation::Silu>(z);
    case Activation::Gelu: return activate_each<Activation::Gelu>(z);
    case Activation::Tanh: return activate_each<Activation::Tanh>(z);
    case Activation::LeakyRelu: return activate_each<Activation::LeakyRelu>(z);
    case Activation::Elu: return activate_each<Activation::Elu>(z);
    default: return;
  }
}

// The slope from what the backward pass has: the argument for SiLU and GELU, the result for all others.
template <Activation kind>
__device__ __forceinline__ float slope_of_saved(float saved) {
  if constexpr (kind == Activation::Silu || kind == Activation::Gelu) {
    return activation_slope<kind>(saved);
  } else if constexpr (kind == Activation::Tanh) {
    return 1.0f - saved * saved;
  } else if constexpr (kind == Activation::Elu) {
    return saved > 0.0f ? 1.0f : saved + 1.0f;
  } else if constexpr (kind == Activation::LeakyRelu) {
    return saved > 0.0f ? 1.0f : float(leaky_relu_slope);
  } else {
    return saved <= 0.0f ? 0.0f : 1.0f;  // ReLU
  }
}

template <Activation kind, int count>
__device__ __forceinline__ void slope_each(float (&grad)[count], const float (&saved)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) grad[i] *= slope_of_saved<kind>(saved[i]);
}

template <int count>
__device__ __forceinline__ void times_slope(float (&grad)[count], const float (&saved)[count], Activation activation) {
  switch (activation) {
    case Activation::Relu: return slope_each<Activation::Relu>(grad, saved);
    case Activation::Silu: return slope_each<Activation::Silu>(grad, saved);
    case Activation::Gelu: return slope_each<Activation::Gelu>(grad, saved);
    case Activation::Tanh: return slope_each<Activation::Tanh>(grad, saved);
    case Activation::LeakyRelu: return slope_each<Activation::LeakyRelu>(grad, saved);
    case Activation::Elu: return slope_each<Activation::Elu>(grad, saved);
    default: return;
  }
}

}  // namespace mrvae::cuda
