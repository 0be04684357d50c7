// Gate and activation functions with their derivatives: the only copy, for the host and the device.
//
//   gate        g = act(p),  p = w * eta + c,  eta = (log beta - mean) / std
//   layer       y = activation(g * (u + b) + t)
//
// Sigmoid and sqrt are Eqn. 6 and 7 of the Multi-Rate VAE paper. Every finite p gives a finite g and a finite slope.
#pragma once

#include <limits>

#include "elementary.h"

namespace mrvae {

enum class Gate : int { Sigmoid = 0, Sqrt = 1, Softplus = 2, Identity = 3 };
constexpr int gate_kinds = 4;

enum class Activation : int { None = 0, Relu = 1, Silu = 2, Gelu = 3, Tanh = 4, LeakyRelu = 5, Elu = 6 };

// The slope of sqrt(1 - e^p) is -e^p / (2 g), without bound as p -> 0-; g is taken as no less than this, so |slope| <= 8.
constexpr double sqrt_gate_floor = 1.0 / 16.0;
constexpr double leaky_relu_slope = 0.01;

// Infinities as the largest numbers, where a factor of 0 would make them NaN
template <class T>
MRVAE_HOST_DEVICE T finite(T z) {
  constexpr T limit = std::numeric_limits<T>::max();
  z = z > limit ? limit : z;
  return z < -limit ? -limit : z;
}

// p = w * eta + c, kept finite: a product that overflows saturates the gate instead of making it NaN later.
template <class T>
MRVAE_HOST_DEVICE T gate_argument(T w, T eta, T c) {
  return finite(w * eta + c);
}

// 1 / (1 + e^-p), from e^-|p| so that nothing overflows
template <class T>
MRVAE_HOST_DEVICE T sigmoid(T p) {
  const T e = elementary::exp(p < T(0) ? p : -p);
  const T r = T(1) / (T(1) + e);
  return p < T(0) ? e * r : r;
}

template <Gate kind, class T>
MRVAE_HOST_DEVICE T gate_value(T p) {
  if constexpr (kind == Gate::Sigmoid) {
    return sigmoid(p);
  } else if constexpr (kind == Gate::Sqrt) {
    const T open = std::sqrt(-elementary::expm1(p < T(0) ? p : T(-1)));
    return p >= T(0) ? T(0) : (p < T(0) ? open : p);  // a NaN p stays NaN
  } else if constexpr (kind == Gate::Softplus) {
    const T e = elementary::exp(p < T(0) ? p : -p);
    return (p > T(0) ? p : (p <= T(0) ? T(0) : p)) + elementary::log1p(e);
  } else {
    return p;
  }
}

// dg/dp
template <Gate kind, class T>
MRVAE_HOST_DEVICE T gate_slope(T p) {
  if constexpr (kind == Gate::Sigmoid) {
    const T e = elementary::exp(p < T(0) ? p : -p);
    const T r = T(1) / (T(1) + e);
    return e * r * r;
  } else if constexpr (kind == Gate::Sqrt) {
    const T q = p < T(0) ? p : T(-1);
    T g = std::sqrt(-elementary::expm1(q));
    g = g < T(sqrt_gate_floor) ? T(sqrt_gate_floor) : g;
    const T slope = T(-0.5) * elementary::exp(q) / g;
    return p >= T(0) ? T(0) : (p < T(0) ? slope : p);
  } else if constexpr (kind == Gate::Softplus) {
    return sigmoid(p);
  } else {
    return T(1);
  }
}

template <Activation kind, class T>
MRVAE_HOST_DEVICE T activate(T z) {
  if constexpr (kind == Activation::Relu) {
    return z <= T(0) ? T(0) : z;
  } else if constexpr (kind == Activation::Silu) {
    return finite(z) * sigmoid(z);
  } else if constexpr (kind == Activation::Gelu) {
    T density;
    return finite(z) * elementary::normal_cumulative(z, density);
  } else if constexpr (kind == Activation::Tanh) {
    return elementary::tanh(z);
  } else if constexpr (kind == Activation::LeakyRelu) {
    return z > T(0) ? z : T(leaky_relu_slope) * z;
  } else if constexpr (kind == Activation::Elu) {
    const T negative = elementary::expm1(z > T(0) ? T(0) : z);
    return z > T(0) ? z : negative;
  } else {
    return z;
  }
}

// d activation / dz; at a kink the slope of the left side, as in torch
template <Activation kind, class T>
MRVAE_HOST_DEVICE T activation_slope(T z) {
  if constexpr (kind == Activation::Relu) {
    return z <= T(0) ? T(0) : T(1);
  } else if constexpr (kind == Activation::Silu) {
    const T s = sigmoid(z);
    return s * (T(1) + finite(z) * (T(1) - s));
  } else if constexpr (kind == Activation::Gelu) {
    T density;
    const T cumulative = elementary::normal_cumulative(z, density);
    return cumulative + finite(z) * density * T(0.39894228040143267794);
  } else if constexpr (kind == Activation::Tanh) {
    const T y = elementary::tanh(z);
    return T(1) - y * y;
  } else if constexpr (kind == Activation::LeakyRelu) {
    return z > T(0) ? T(1) : T(leaky_relu_slope);
  } else if constexpr (kind == Activation::Elu) {
    const T negative = elementary::exp(z > T(0) ? T(0) : z);
    return z > T(0) ? T(1) : negative;
  } else {
    return T(1);
  }
}

}  // namespace mrvae
