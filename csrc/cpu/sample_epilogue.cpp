// The epilogue of a Linear with one beta a sample, whose gates are made a chunk at a time in the first-level cache.
#include <ATen/Parallel.h>

#include "epilogue_runs.h"
#include "gate_rows.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t serial_elements = 8192;  // below this the thread pool costs more than it gives
constexpr std::int64_t unit = 16;               // channels: what an AVX-512 register holds
constexpr std::int64_t sum_samples = 16;        // samples whose bias gradient is summed before it joins the others'

template <class S, class T>
void forward(const SampleEpilogue<T>& s, const S* u, S* y) {
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / s.channels);
  at::parallel_for(0, s.samples, grain, [&](std::int64_t first, std::int64_t last) {
    T gate[chunk];
    const T zeros[chunk] = {};
    for (std::int64_t n = first; n < last; ++n) {
      for (std::int64_t begin = 0; begin < s.channels; begin += chunk) {
        const std::int64_t size = std::min(chunk, s.channels - begin), at = n * s.channels + begin;
        value_row(s.kind, s.gate_weight + begin, s.gate_bias + begin, s.eta[n], gate, size);
        forward_run<S, T>(u + at, y + at, size, Vectors<T>{gate, s.bias == nullptr ? zeros : s.bias + begin, zeros},
                          s.activation);
      }
    }
  });
}

// What one sample adds to the sums of n channels, at most a chunk; du. d: the gradient before the activation.
template <bool of_result, class S, class T>
MRVAE_HOST_DEVICE void add_loop(const S* u, const T* d, std::int64_t n, const T* gate, const T* slope, T eta,
                                const T* bias, S* grad_u, T* grad_weight, T* grad_bias, T* sum) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T g = gate[i], y = load(u[i]);
    const T v = of_result ? (g == T(0) ? T(0) : y / g) : y + bias[i];
    const T dp = d[i] * v * slope[i], du = d[i] * g;
    grad_weight[i] += dp * eta;
    grad_bias[i] += dp;
    sum[i] += du;
    store(grad_u[i], du);
  }
}

template <class S, class T>
MRVAE_CLONES void add_sample(const S* grad, const S* u, std::int64_t n, Vectors<T> with, const T* slope, T eta,
                             Activation activation, bool of_result, S* grad_u, T* grad_weight, T* grad_bias, T* sum) {
  T d[chunk];
  preactivation_gradient(grad, u, n, with, activation, d);
  of_result ? add_loop<true>(u, d, n, with.gate, slope, eta, with.bias, grad_u, grad_weight, grad_bias, sum)
            : add_loop<false>(u, d, n, with.gate, slope, eta, with.bias, grad_u, grad_weight, grad_bias, sum);
}

template <class T>
MRVAE_CLONES void move_sums(T* sum, T* total, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    total[i] += sum[i];
    sum[i] = 0;
  }
}

// The channels are shared out, so that each one's sums run over the samples in their order.
template <class S, class T>
void backward(const SampleEpilogue<T>& s, const S* grad, const S* u, const SampleEpilogueGradients<T>& out) {
  Activation activation = s.activation;
  if (s.of_result && activation == Activation::Relu) activation = relu_of_result;
  const std::int64_t units = (s.channels + unit - 1) / unit;
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / (unit * s.samples));
  at::parallel_for(0, units, grain, [&](std::int64_t first, std::int64_t last) {
    T gate[chunk], slope[chunk], sum[chunk], weight[chunk], bias[chunk], total[chunk];
    S unwanted[chunk];
    const T zeros[chunk] = {};
    const std::int64_t end = std::min(s.channels, last * unit);
    for (std::int64_t begin = first * unit; begin < end; begin += chunk) {
      const std::int64_t size = std::min(chunk, end - begin);
      for (T* values : {sum, weight, bias, total}) std::fill_n(values, size, T(0));
      for (std::int64_t n = 0; n < s.samples; ++n) {
        const std::int64_t at = n * s.channels + begin;
        point_row(s.kind, s.gate_weight + begin, s.gate_bias + begin, s.eta[n], gate, slope, size);
        add_sample(grad + at, u + at, size, Vectors<T>{gate, s.bias == nullptr ? zeros : s.bias + begin, zeros}, slope,
                   s.eta[n], activation, s.of_result, out.u == nullptr ? unwanted : static_cast<S*>(out.u) + at, weight,
                   bias, sum);
        if ((n + 1) % sum_samples == 0 || n + 1 == s.samples) move_sums(sum, total, size);
      }
      if (out.gate_weight != nullptr) std::copy_n(weight, size, out.gate_weight + begin);
      if (out.gate_bias != nullptr) std::copy_n(bias, size, out.gate_bias + begin);
      if (out.bias != nullptr) std::copy_n(total, size, out.bias + begin);
    }
  });
}

}  // namespace

template <class T>
void sample_epilogue_forward(Storage storage, const SampleEpilogue<T>& shape, const void* u, void* y) {
  if (shape.samples * shape.channels == 0) return;
  if constexpr (std::is_same_v<T, float>) {
    if (storage == Storage::BFloat16) return forward(shape, static_cast<const BFloat16*>(u), static_cast<BFloat16*>(y));
  }
  forward(shape, static_cast<const T*>(u), static_cast<T*>(y));
}

template <class T>
void sample_epilogue_backward(Storage storage, const SampleEpilogue<T>& shape, const void* grad, const void* u,
                              const SampleEpilogueGradients<T>& out) {
  if constexpr (std::is_same_v<T, float>) {
    if (storage == Storage::BFloat16) {
      return backward(shape, static_cast<const BFloat16*>(grad), static_cast<const BFloat16*>(u), out);
    }
  }
  backward(shape, static_cast<const T*>(grad), static_cast<const T*>(u), out);
}

#define MRVAE_INSTANTIATE(T)                                                                              \
  template void sample_epilogue_forward<T>(Storage, const SampleEpilogue<T>&, const void*, void*);        \
  template void sample_epilogue_backward<T>(Storage, const SampleEpilogue<T>&, const void*, const void*, \
                                            const SampleEpilogueGradients<T>&);
MRVAE_INSTANTIATE(float)
MRVAE_INSTANTIATE(double)
#undef MRVAE_INSTANTIATE

}  // namespace mrvae::cpu
