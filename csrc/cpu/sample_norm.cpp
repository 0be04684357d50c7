// Batch norms with one affine a sample: the gradient of the input, in one pass over dz and x.
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t serial_elements = 16384;  // below this the thread pool costs more than it gives

// Of one channel.
template <class T>
MRVAE_CLONES void run(const T* grad, const T* x, std::int64_t n, T gain, T minus_mean, T slope, T constant, T* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) out[i] = gain * grad[i] + (slope * (x[i] + minus_mean) + constant);
}

// Of one position: a number of each channel.
template <class T>
MRVAE_CLONES void row(const T* grad, const T* x, std::int64_t n, const T* gain, const T* minus_mean, const T* slope,
                      const T* constant, T* out) {
#pragma omp simd
  for (std::int64_t c = 0; c < n; ++c) out[c] = gain[c] * grad[c] + (slope[c] * (x[c] + minus_mean[c]) + constant[c]);
}

}  // namespace

template <class T>
void sample_norm_backward(const EpilogueShape& s, const T* grad, const T* x, const SampleNormSlopes<T>& with, T* out) {
  const std::int64_t block = s.channels * s.inner;
  if (s.samples * s.rows * block == 0) return;
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / block);
  at::parallel_for(0, s.samples * s.rows, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      const T* gain = with.gain + k / s.rows * s.channels;
      std::int64_t at = k * block;
      if (s.inner == 1) {
        row(grad + at, x + at, s.channels, gain, with.minus_mean, with.slope, with.constant, out + at);
        continue;
      }
      for (std::int64_t c = 0; c < s.channels; ++c, at += s.inner) {
        run(grad + at, x + at, s.inner, gain[c], with.minus_mean[c], with.slope[c], with.constant[c], out + at);
      }
    }
  });
}

template void sample_norm_backward(const EpilogueShape&, const float*, const float*, const SampleNormSlopes<float>&,
                                   float*);
template void sample_norm_backward(const EpilogueShape&, const double*, const double*, const SampleNormSlopes<double>&,
                                   double*);

}  // namespace mrvae::cpu
