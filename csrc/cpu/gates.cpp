#include <ATen/Parallel.h>

#include <algorithm>

#include "preactivation.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t block = 256;             // features a task of the backward pass handles
constexpr std::int64_t serial_elements = 8192;  // below this the thread pool costs more than it gives

template <Gate kind, int degree, class T>
MRVAE_HOST_DEVICE void value_loop(const Preactivation<degree, T>& of, T* values, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) values[i] = gate_value<kind>(of.p(i));
}

template <int degree, class T>
MRVAE_CLONES void value_row(Gate kind, GateParameters<const T> with, T eta, T* values, std::int64_t n) {
  const Preactivation<degree, T> of(with, eta);
  switch (kind) {
    case Gate::Sigmoid: return value_loop<Gate::Sigmoid>(of, values, n);
    case Gate::Sqrt: return value_loop<Gate::Sqrt>(of, values, n);
    case Gate::Softplus: return value_loop<Gate::Softplus>(of, values, n);
    case Gate::Identity: return value_loop<Gate::Identity>(of, values, n);
  }
}

// Adds what one sample gives to the parameters' gradients, and returns its deta.
template <Gate kind, int degree, class T>
MRVAE_HOST_DEVICE T slope_loop(const Preactivation<degree, T>& of, const T* grad, const GateParameters<T>& grads,
                               std::int64_t n) {
  T grad_eta = 0;
#pragma omp simd reduction(+ : grad_eta)
  for (std::int64_t i = 0; i < n; ++i) {
    const T dp = grad[i] * gate_slope<kind>(of.p(i));
    of.add(grads, i, dp);
    grad_eta += dp * of.slope(i);
  }
  return grad_eta;
}

template <int degree, class T>
MRVAE_CLONES T slope_row(Gate kind, GateParameters<const T> with, T eta, const T* grad, GateParameters<T> grads,
                         std::int64_t n) {
  const Preactivation<degree, T> of(with, eta);
  switch (kind) {
    case Gate::Sigmoid: return slope_loop<Gate::Sigmoid>(of, grad, grads, n);
    case Gate::Sqrt: return slope_loop<Gate::Sqrt>(of, grad, grads, n);
    case Gate::Softplus: return slope_loop<Gate::Softplus>(of, grad, grads, n);
    default: return slope_loop<Gate::Identity>(of, grad, grads, n);
  }
}

}  // namespace

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                   std::int64_t samples) {
  std::int64_t features = 0;
  for (const auto& slice : slices) features += slice.size;
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / std::max<std::int64_t>(1, features));
  at::parallel_for(0, samples, grain, [&](std::int64_t begin, std::int64_t end) {
    for (const auto& slice : slices) {
      for (std::int64_t n = begin; n < end; ++n) {
        const auto with = parameters.from(slice.offset);
        T* values = slice.values + n * slice.size;
        with_degree(with.degree, [&](auto degree) { value_row<degree>(slice.kind, with, eta[n], values, slice.size); });
      }
    }
  });
}

template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                    std::int64_t samples, const GateParameters<T>& grads, T* grad_eta) {
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
      std::fill_n(grads.bias + offset, size, T(0));
      for (int row = 0; row < grads.degree; ++row) std::fill_n(grads.row(row) + offset, size, T(0));
      if (slice.values == nullptr) continue;
      for (std::int64_t n = 0; n < samples; ++n) {
        const auto with = parameters.from(offset);
        const T* grad = slice.values + n * slice.size + begin;
        T sum = 0;
        with_degree(with.degree, [&](auto degree) {
          sum = slope_row<degree>(slice.kind, with, eta[n], grad, grads.from(offset), size);
        });
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
  template void gates_forward<T>(const std::vector<GateSlice<T>>&, const GateParameters<const T>&, const T*,       \
                                 std::int64_t);                                                                    \
  template void gates_backward<T>(const std::vector<GateSlice<T>>&, const GateParameters<const T>&, const T*,      \
                                  std::int64_t, const GateParameters<T>&, T*);
MRVAE_INSTANTIATE(float)
MRVAE_INSTANTIATE(double)
#undef MRVAE_INSTANTIATE

}  // namespace mrvae::cpu
