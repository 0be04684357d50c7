// The epilogue where the channel is the fastest axis and one gate serves all rows, as in a Linear with one beta: row by
// row, without the copies of g, b and t that joined rows take. On 16 x 32 those copies were 4/5 of the work.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "epilogue_runs.h"

namespace mrvae::cpu {

constexpr std::int64_t row_sums = 64;     // rows whose sums are added up in float
constexpr std::int64_t row_tasks = 32;    // so that their partial sums stay small beside the data
constexpr std::int64_t least_row = 8;     // many rows shorter than this are better joined
constexpr std::int64_t row_block = 32768; // elements of a task

inline bool by_rows(const EpilogueShape& s) {
  return s.samples == 1 && s.inner == 1 && s.channels > 0 && (s.channels >= least_row || s.rows <= 256);
}

// None, ReLU and leaky ReLU; the others go over chunks.
inline bool inside_loops(Activation activation) {
  return activation == Activation::None || activation == Activation::Relu || activation == Activation::LeakyRelu;
}

template <Activation kind, bool with_bias, bool with_shift, class S, class T>
MRVAE_HOST_DEVICE void rows_loop(const S* u, S* y, std::int64_t rows, std::int64_t n, const Vectors<T>& p) {
  for (std::int64_t r = 0; r < rows; ++r, u += n, y += n) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      T z = load(u[i]);
      if constexpr (with_bias) z += p.b(i);
      z *= p.g(i);
      if constexpr (with_shift) z += p.t(i);
      store(y[i], activate<kind>(z));
    }
  }
}

template <Activation kind, class S, class T>
MRVAE_HOST_DEVICE void rows_of(const S* u, S* y, std::int64_t rows, std::int64_t n, const Vectors<T>& p) {
  if (p.shift != nullptr) {
    return p.bias == nullptr ? rows_loop<kind, false, true>(u, y, rows, n, p) : rows_loop<kind, true, true>(u, y, rows, n, p);
  }
  p.bias == nullptr ? rows_loop<kind, false, false>(u, y, rows, n, p) : rows_loop<kind, true, false>(u, y, rows, n, p);
}

// y = activation(g * (u + b) + t) for the activations that run inside the loop; the vectors of a bias or shift that the
// layer lacks are nullptr here.
template <class S, class T>
MRVAE_CLONES void forward_rows(const S* u, S* y, std::int64_t rows, std::int64_t n, Vectors<T> p, Activation activation) {
  if (activation == Activation::Relu) return rows_of<Activation::Relu>(u, y, rows, n, p);
  if (activation == Activation::LeakyRelu) return rows_of<Activation::LeakyRelu>(u, y, rows, n, p);
  rows_of<Activation::None>(u, y, rows, n, p);
}

template <bool relu, bool with_sum, class S, class T>
MRVAE_HOST_DEVICE void result_loop(const S* grad, const S* y, std::int64_t rows, std::int64_t n, const T* gate, S* grad_u,
                                   T* dot, T* sum) {
  for (std::int64_t r = 0; r < rows; ++r, grad += n, y += n, grad_u += n) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const T v = load(y[i]), dy = load(grad[i]), d = relu && !(v > T(0)) ? T(0) : dy;
      dot[i] += d * v;
      if constexpr (with_sum) sum[i] += d;
      store(grad_u[i], gate[i] * d);
    }
  }
}

// du = g * dz, and adds dz * y and dz to the sums of each channel; y is the result of ReLU or of no activation. sum may be
// nullptr; grad_u and grad may be the same memory.
template <class S, class T>
MRVAE_CLONES void backward_result(const S* grad, const S* y, std::int64_t rows, std::int64_t n, const T* gate, bool relu,
                                  S* grad_u, T* dot, T* sum) {
  if (relu) {
    return sum == nullptr ? result_loop<true, false>(grad, y, rows, n, gate, grad_u, dot, sum)
                          : result_loop<true, true>(grad, y, rows, n, gate, grad_u, dot, sum);
  }
  sum == nullptr ? result_loop<false, false>(grad, y, rows, n, gate, grad_u, dot, sum)
                 : result_loop<false, true>(grad, y, rows, n, gate, grad_u, dot, sum);
}

// dg = sum dz y / g (0 for a gate of 0), and db = g sum dz where dz is not nullptr
template <class T>
MRVAE_CLONES void finish_result(const T* gate, std::int64_t n, T* grad_gate, T* sum) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T g = gate[i], quotient = grad_gate[i] / (g == T(0) ? T(1) : g);
    grad_gate[i] = g == T(0) ? T(0) : quotient;
  }
  if (sum == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] *= gate[i];
}

template <class T>
MRVAE_CLONES void add_to(const T* values, std::int64_t n, T* total) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) total[i] += values[i];
}

// Whether backward_of_result() computes it: where there is no shift, of few enough rows to be added up in float.
template <class T>
bool result_by_rows(const EpilogueShape& s, const EpilogueParameters<T>& with, const EpilogueGradients<T>& out) {
  return with.of_result && by_rows(s) && s.rows <= row_sums * row_tasks && out.u != nullptr && out.gate != nullptr &&
         out.shift == nullptr && with.shift == nullptr;
}

// The whole backward pass from y = with.of_result. Partial sums of up to row_sums rows are added in the order of the rows.
template <class S, class T>
void backward_of_result(const EpilogueShape& s, const S* grad, const S* y, const EpilogueParameters<T>& with,
                        const EpilogueGradients<T>& out, std::int64_t serial_elements) {
  const std::int64_t n = s.channels, rows = std::clamp<std::int64_t>(row_block / n, 16, row_sums);
  const std::int64_t tasks = (s.rows + rows - 1) / rows, sums = out.bias == nullptr ? 1 : 2;
  const bool relu = with.activation != Activation::None;
  std::fill_n(out.gate, n, T(0));
  if (out.bias != nullptr) std::fill_n(out.bias, n, T(0));
  if (tasks == 1) {
    backward_result(grad, y, s.rows, n, with.gate, relu, static_cast<S*>(out.u), out.gate, out.bias);
    return finish_result(with.gate, n, out.gate, out.bias);
  }
  std::vector<T> partial(std::size_t(tasks * sums * n), T(0));
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / (rows * n));
  at::parallel_for(0, tasks, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      const std::int64_t at = k * rows * n;
      T* dot = partial.data() + k * sums * n;
      backward_result(grad + at, y + at, std::min(rows, s.rows - k * rows), n, with.gate, relu,
                      static_cast<S*>(out.u) + at, dot, sums == 1 ? nullptr : dot + n);
    }
  });
  for (std::int64_t k = 0; k < tasks; ++k) {
    add_to(partial.data() + k * sums * n, n, out.gate);
    if (sums == 2) add_to(partial.data() + (k * sums + 1) * n, n, out.bias);
  }
  finish_result(with.gate, n, out.gate, out.bias);
}

}  // namespace mrvae::cpu
