// The argument of gates at one eta, for loops over the gates.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {

// p of gate i, its derivative by eta, and what dp adds to the parameters' gradients.
template <int degree, class T>
struct Preactivation {
  GateParameters<const T> with;
  T eta, basis[degree], slopes[degree];
  MRVAE_HOST_DEVICE Preactivation(const GateParameters<const T>& parameters, T at) : with(parameters), eta(at) {
    for (int k = 0; k < degree; ++k) {
      basis[k] = polynomial(k, at);
      slopes[k] = polynomial_slope(k, at);
    }
  }
  MRVAE_HOST_DEVICE T p(std::int64_t i) const {
    T rest = with.bias[i];
    for (int k = 1; k < degree; ++k) rest += with.row(k)[i] * basis[k];
    return gate_argument(with.weight[i], eta, rest);
  }
  MRVAE_HOST_DEVICE T slope(std::int64_t i) const {
    T sum = with.weight[i];
    for (int k = 1; k < degree; ++k) sum += with.row(k)[i] * slopes[k];
    return sum;
  }
  MRVAE_HOST_DEVICE void add(const GateParameters<T>& grads, std::int64_t i, T dp) const {
    for (int k = 0; k < degree; ++k) grads.row(k)[i] += dp * basis[k];
    grads.bias[i] += dp;
  }
};

}  // namespace mrvae::cpu
