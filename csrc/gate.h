// Gate and activation functions with their derivatives: the only copy, for the host and the device.
//
//   gate        g = act(p),  p = w * eta + c,  eta = (log beta - mean) / std
//               of degree 2 or 3: p = sum_k w_k P_k(eta) + c, see polynomial()
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

template <class T>
MRVAE_HOST_DEVICE T gate_argument(T w, T eta, T c) {
  return w * eta + c;
}

constexpr int gate_degrees = 3;

// P_k(eta), k from 0: eta, eta^2 - 1, eta^3 - 9/5 eta. Legendre's polynomials, to a factor: of mean 0 and orthogonal while
// log beta is uniform on its range, so that each bends a gate without turning or moving it.
template <class T>
MRVAE_HOST_DEVICE T polynomial(int k, T eta) {
  return k == 0 ? eta : k == 1 ? eta * eta - T(1) : (eta * eta - T(1.8)) * eta;
}
// dP_k / deta
template <class T>
MRVAE_HOST_DEVICE T polynomial_slope(int k, T eta) {
  return k == 0 ? T(1) : k == 1 ? T(2) * eta : T(3) * eta * eta - T(1.8);
}

// 1 / (1 + e^-p), from e^-|p| so that nothing overflows
template <class T>
MRVAE_HOST_DEVICE T sigmoid(T p) {
  const T e = elementary::exp(p < T(0) ? p : -p);
  const T r = T(1) / (T(1) + e);
  return p < T(0) ? e * r : r;
}

template <class T>
struct GatePoint {
  T value, slope, relative;  // g, dg/dp and (dg/dp) / g: what the slope is by y in place of u + b = y / g
};

// All from one e^-|p|; whoever reads one of them only pays for that. An infinite p saturates the gate instead of
// making it NaN later.
//
// |p| and min(p, 0) are arithmetic: of `p < 0 ? p : -p` GCC makes paths through the whole function, every one of them
// computed under a mask: 85 instructions of AVX-512 in place of 40, 0.65 ns a sqrt gate in place of 0.21. So does
// `closed || open == 0`: a linear network's step with one beta a sample took 1.3 times as long.
template <Gate kind, class T>
MRVAE_HOST_DEVICE GatePoint<T> gate_point(T p) {
  constexpr T least = std::numeric_limits<T>::min();  // by a gate of 0 there is nothing to divide
  if constexpr (kind == Gate::Identity) {
    return {finite(p), T(1), T(0)};  // a shift, not a gate: nothing is divided by it
  } else if constexpr (kind == Gate::Sqrt) {
    T e, rest;
    elementary::decay(T(0.5) * (p - std::fabs(p)), e, rest);
    const T open = std::sqrt(rest), divisor = open < T(sqrt_gate_floor) ? T(sqrt_gate_floor) : open;
    const T half = T(-0.5) * e, product = open * divisor;
    const bool closed = p >= T(0);  // not of a NaN
    return {closed ? T(0) : open, closed ? T(0) : half / divisor,
            closed ? T(0) : half / (product < least ? least : product)};
  } else {
    T e, rest;
    elementary::decay(-std::fabs(p), e, rest);
    const T r = T(1) / (T(1) + e), small = e * r, cumulative = p < T(0) ? small : r;
    if constexpr (kind == Gate::Sigmoid) return {cumulative, small * r, p < T(0) ? r : small};
    const T value = finite((p < T(0) ? T(0) : p) + elementary::log1p(e));
    return {value, cumulative, cumulative / (value < least ? least : value)};
  }
}

template <Gate kind, class T>
MRVAE_HOST_DEVICE T gate_value(T p) {
  return gate_point<kind>(p).value;
}

// dg/dp
template <Gate kind, class T>
MRVAE_HOST_DEVICE T gate_slope(T p) {
  return gate_point<kind>(p).slope;
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
