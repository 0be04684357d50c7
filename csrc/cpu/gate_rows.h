// The gates of one sample, in vector code.
#pragma once

#include "vector.h"

namespace mrvae::cpu {

template <Gate kind, class T>
MRVAE_HOST_DEVICE void value_loop(const T* weight, const T* bias, T eta, T* values, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) values[i] = gate_value<kind>(gate_argument(weight[i], eta, bias[i]));
}

template <class T>
MRVAE_CLONES void value_row(Gate kind, const T* weight, const T* bias, T eta, T* values, std::int64_t n) {
  switch (kind) {
    case Gate::Sigmoid: return value_loop<Gate::Sigmoid>(weight, bias, eta, values, n);
    case Gate::Sqrt: return value_loop<Gate::Sqrt>(weight, bias, eta, values, n);
    case Gate::Softplus: return value_loop<Gate::Softplus>(weight, bias, eta, values, n);
    case Gate::Identity: return value_loop<Gate::Identity>(weight, bias, eta, values, n);
  }
}

template <Gate kind, class T>
MRVAE_HOST_DEVICE void point_loop(const T* weight, const T* bias, T eta, T* values, T* slopes, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const GatePoint<T> point = gate_point<kind>(gate_argument(weight[i], eta, bias[i]));
    values[i] = point.value;
    slopes[i] = point.slope;
  }
}

// Values and slopes, for less than a third more than the values.
template <class T>
MRVAE_CLONES void point_row(Gate kind, const T* weight, const T* bias, T eta, T* values, T* slopes, std::int64_t n) {
  switch (kind) {
    case Gate::Sigmoid: return point_loop<Gate::Sigmoid>(weight, bias, eta, values, slopes, n);
    case Gate::Sqrt: return point_loop<Gate::Sqrt>(weight, bias, eta, values, slopes, n);
    case Gate::Softplus: return point_loop<Gate::Softplus>(weight, bias, eta, values, slopes, n);
    case Gate::Identity: return point_loop<Gate::Identity>(weight, bias, eta, values, slopes, n);
  }
}

}  // namespace mrvae::cpu
