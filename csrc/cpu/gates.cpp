#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t block = 256;             // features a task of the backward pass handles
constexpr std::int64_t serial_elements = 8192;  // below this the thread pool costs more than it gives

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

// Adds one sample's dp * eta and dp, and returns its sum of dp * w.
template <Gate kind, class T>
MRVAE_HOST_DEVICE T slope_loop(const T* weight, const T* bias, T eta, const T* grad, T* grad_weight, T* grad_bias,
                               std::int64_t n) {
  T grad_eta = 0;
#pragma omp simd reduction(+ : grad_eta)
  for (std::int64_t i = 0; i < n; ++i) {
    const T dp = grad[i] * gate_slope<kind>(gate_argument(weight[i], eta, bias[i]));
    grad_weight[i] += dp * eta;
    grad_bias[i] += dp;
    grad_eta += dp * weight[i];
  }
  return grad_eta;
}

template <class T>
MRVAE_CLONES T slope_row(Gate kind, const T* weight, const T* bias, T eta, const T* grad, T* grad_weight, T* grad_bias,
                         std::int64_t n) {
  switch (kind) {
    case Gate::Sigmoid: return slope_loop<Gate::Sigmoid>(weight, bias, eta, grad, grad_weight, grad_bias, n);
    case Gate::Sqrt: return slope_loop<Gate::Sqrt>(weight, bias, eta, grad, grad_weight, grad_bias, n);
    case Gate::Softplus: return slope_loop<Gate::Softplus>(weight, bias, eta, grad, grad_weight, grad_bias, n);
    default: return slope_loop<Gate::Identity>(weight, bias, eta, grad, grad_weight, grad_bias, n);
  }
}

}  // namespace

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const T* weight, const T* bias, const T* eta,
                   std::int64_t samples) {
  std::int64_t features = 0;
  for (const auto& slice : slices) features += slice.size;
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / std::max<std::int64_t>(1, features));
  at::parallel_for(0, samples, grain, [&](std::int64_t begin, std::int64_t end) {
    for (const auto& slice : slices) {
      for (std::int64_t n = begin; n < end; ++n) {
        value_row(slice.kind, weight + slice.offset, bias + slice.offset, eta[n], slice.values + n * slice.size,
                  slice.size);
      }
    }
  });
}

template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const T* weight, const T* bias, const T* eta,
                    std::int64_t samples, T* grad_weight, T* grad_bias, T* grad_eta) {
  struct Task {
    const GateSlice<T>* slice;
    std::int64_t begin, size;
  };
  std::vector<Task> tasks;
  for (const auto& slice : slices) {
    for (std::int64_t begin = 0; begin < slice.size; begin += block) {
      tasks.push_back({&slice, begin, std::min(block, slice.size - begin)});
    }
  }
  const auto count = std::int64_t(tasks.size());
  std::vector<T> partial(grad_eta == nullptr ? 0 : count * samples);
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / (block * std::max<std::int64_t>(1, samples)));
  at::parallel_for(0, count, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      const GateSlice<T>& slice = *tasks[k].slice;
      const std::int64_t begin = tasks[k].begin, size = tasks[k].size, offset = slice.offset + begin;
      std::fill_n(grad_weight + offset, size, T(0));
      std::fill_n(grad_bias + offset, size, T(0));
      if (slice.values == nullptr) continue;
      for (std::int64_t n = 0; n < samples; ++n) {
        const T sum = slope_row(slice.kind, weight + offset, bias + offset, eta[n],
                                slice.values + n * slice.size + begin, grad_weight + offset, grad_bias + offset, size);
        if (grad_eta != nullptr) partial[k * samples + n] = sum;
      }
    }
  });
  if (grad_eta == nullptr) return;
  std::fill_n(grad_eta, samples, T(0));
  for (std::int64_t k = 0; k < count; ++k) {
    for (std::int64_t n = 0; n < samples; ++n) grad_eta[n] += partial[k * samples + n];
  }
}

#define MRVAE_INSTANTIATE(T)                                                                                       \
  template void gates_forward<T>(const std::vector<GateSlice<T>>&, const T*, const T*, const T*, std::int64_t);    \
  template void gates_backward<T>(const std::vector<GateSlice<T>>&, const T*, const T*, const T*, std::int64_t, T*, \
                                  T*, T*);
MRVAE_INSTANTIATE(float)
MRVAE_INSTANTIATE(double)
#undef MRVAE_INSTANTIATE

}  // namespace mrvae::cpu
