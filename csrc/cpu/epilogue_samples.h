// The epilogue's backward pass where every gate scales one element, as in a Linear with one beta a sample: a single pass
// over dy and u, or y, without sums but the bias gradient's.
#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "epilogue_runs.h"

namespace mrvae::cpu {

constexpr std::int64_t task_samples = 16;  // samples whose bias gradient is summed by one task

template <class S, class T>
MRVAE_CLONES void backward_sample(const S* grad, const S* u, std::int64_t n, Vectors<T> with, Activation activation,
                                  bool of_result, S* grad_u, T* grad_gate, T* grad_shift, T* grad_bias) {
  T d[chunk], v[chunk];
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t size = std::min(chunk, n - begin);
    const Vectors<T> p = with.from(begin);
    preactivation_gradient(grad + begin, u + begin, size, p, activation, d);
    if (grad_gate != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) {
        const T g = p.g(i), y = load(u[begin + i]);
        v[i] = of_result ? (g == T(0) ? T(0) : (y - p.t(i)) / g) : y + p.b(i);
      }
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) grad_gate[begin + i] = d[i] * v[i];
    }
    if (grad_shift != nullptr) std::copy_n(d, size, grad_shift + begin);
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) d[i] *= p.g(i);
    if (grad_u != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) store(grad_u[begin + i], d[i]);
    }
    if (grad_bias != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < size; ++i) grad_bias[begin + i] += d[i];
    }
  }
}

template <class S, class T>
void backward_samples(const EpilogueShape& s, const S* grad, const S* u, const EpilogueParameters<T>& with,
                      const EpilogueGradients<T>& out, std::int64_t serial_elements) {
  const std::int64_t channels = s.channels, tasks = (s.samples + task_samples - 1) / task_samples;
  const std::vector<T> zeros(std::size_t(channels), T(0));
  std::vector<T> partial(out.bias == nullptr ? 0 : std::size_t(tasks * channels), T(0));
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / (task_samples * channels));
  at::parallel_for(0, tasks, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      for (std::int64_t p = k * task_samples; p < std::min(s.samples, (k + 1) * task_samples); ++p) {
        const std::int64_t at = p * channels;
        const Vectors<T> vectors{with.gate + at, with.bias == nullptr ? zeros.data() : with.bias,
                                 with.shift == nullptr ? zeros.data() : with.shift + at};
        backward_sample(grad + at, u + at, channels, vectors, with.activation, with.of_result,
                        out.u == nullptr ? nullptr : static_cast<S*>(out.u) + at,
                        out.gate == nullptr ? nullptr : out.gate + at, out.shift == nullptr ? nullptr : out.shift + at,
                        out.bias == nullptr ? nullptr : partial.data() + k * channels);
      }
    }
  });
  if (out.bias == nullptr) return;
  std::fill_n(out.bias, channels, T(0));
  for (std::int64_t k = 0; k < tasks; ++k) {
    for (std::int64_t c = 0; c < channels; ++c) out.bias[c] += partial[k * channels + c];
  }
}

}  // namespace mrvae::cpu
