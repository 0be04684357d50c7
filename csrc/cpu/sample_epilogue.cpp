// The epilogue of a Linear with one beta a sample, whose gates are made element by element on the way.
#include <ATen/Parallel.h>

#include <stdexcept>
#include <vector>

#include "epilogue_runs.h"
#include "preactivation.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t serial_elements = 8192;  // below this the thread pool costs more than it gives
constexpr std::int64_t unit = 16;               // channels: what an AVX-512 register holds
constexpr std::int64_t sum_samples = 16;        // samples whose bias gradient is summed before it joins the others'

// The shifts of one sample, and none.
template <int degree, class T>
struct MadeShifts {
  Preactivation<degree, T> of;
  MRVAE_HOST_DEVICE MadeShifts(const GateParameters<const T>& with, T eta) : of(with, eta) {}
  MRVAE_HOST_DEVICE MadeShifts from(std::int64_t i) const { return {of.with.from(i), of.eta}; }
  MRVAE_HOST_DEVICE T t(std::int64_t i) const { return gate_point<Gate::Identity>(of.p(i)).value; }
  MRVAE_HOST_DEVICE void add(const GateParameters<T>& grads, std::int64_t i, T d) const { of.add(grads, i, d); }
};
template <int, class T>
struct NoShifts {
  MRVAE_HOST_DEVICE NoShifts(const GateParameters<const T>&, T) {}
  MRVAE_HOST_DEVICE NoShifts from(std::int64_t) const { return *this; }
  MRVAE_HOST_DEVICE T t(std::int64_t) const { return T(0); }
  MRVAE_HOST_DEVICE void add(const GateParameters<T>&, std::int64_t, T) const {}
};

// Parameters as those of epilogue_runs.h, of one sample.
template <Gate kind, int degree, class Shifts, class T>
struct MadeGates {
  Preactivation<degree, T> of;
  const T* bias;  // the layer's
  Shifts shifts;
  MRVAE_HOST_DEVICE MadeGates from(std::int64_t i) const {
    return {{of.with.from(i), of.eta}, bias + i, shifts.from(i)};
  }
  MRVAE_HOST_DEVICE GatePoint<T> point(std::int64_t i) const { return gate_point<kind>(of.p(i)); }
  MRVAE_HOST_DEVICE T g(std::int64_t i) const { return point(i).value; }
  MRVAE_HOST_DEVICE T b(std::int64_t i) const { return bias[i]; }
  MRVAE_HOST_DEVICE T t(std::int64_t i) const { return shifts.t(i); }
};

// Calls function(kind, degree, shifts), which say what is made, as types and constants.
template <Gate kind>
using KindOf = std::integral_constant<Gate, kind>;
template <class T, class Function>
void with_made(const SampleEpilogue<T>& s, const Function& function) {
  with_degree(s.gates.degree, [&](auto degree) {
    const auto of_kind = [&](auto kind) {
      if (s.shifts.weight == nullptr) return function(kind, degree, static_cast<NoShifts<degree, T>*>(nullptr));
      return function(kind, degree, static_cast<MadeShifts<degree, T>*>(nullptr));
    };
    switch (s.kind) {
      case Gate::Sigmoid: return of_kind(KindOf<Gate::Sigmoid>());
      case Gate::Sqrt: return of_kind(KindOf<Gate::Sqrt>());
      case Gate::Softplus: return of_kind(KindOf<Gate::Softplus>());
      case Gate::Identity: break;
    }
    throw std::logic_error("a shift is no gate");
  });
}

template <Gate kind, int degree, class Shifts, class S, class T>
void forward_of_kind(const SampleEpilogue<T>& s, const S* u, S* y) {
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / s.channels);
  at::parallel_for(0, s.samples, grain, [&](std::int64_t first, std::int64_t last) {
    const std::vector<T> zeros(s.bias == nullptr ? std::size_t(s.channels) : 0);
    const T* bias = s.bias == nullptr ? zeros.data() : s.bias;
    for (std::int64_t n = first; n < last; ++n) {
      const MadeGates<kind, degree, Shifts, T> gates{{s.gates, s.eta[n]}, bias, {s.shifts, s.eta[n]}};
      forward_run<S, T>(u + n * s.channels, y + n * s.channels, s.channels, gates, s.activation);
    }
  });
}

template <class S, class T>
void forward(const SampleEpilogue<T>& s, const S* u, S* y) {
  with_made(s, [&]<class Shifts>(auto kind, auto degree, Shifts*) { forward_of_kind<kind, degree, Shifts>(s, u, y); });
}

// The gradient before the activation, by dy and z, its argument or result: without an activation, of ReLU's, which lets a
// NaN through as torch's does, or found already.
template <class S>
struct Plain {
  const S* grad;
  template <class T>
  MRVAE_HOST_DEVICE T at(std::int64_t i, T) const { return load(grad[i]); }
};
template <class S>
struct OfRelu {
  const S* grad;
  template <class T>
  MRVAE_HOST_DEVICE T at(std::int64_t i, T z) const { return z <= T(0) ? T(0) : T(load(grad[i])); }
};
template <class T>
struct Found {
  const T* values;
  MRVAE_HOST_DEVICE T at(std::int64_t i, T) const { return values[i]; }
};

// What one sample adds to the sums of n channels, and du. dp = d (u + b) g' = d (y - t) (g' / g), dt = d.
template <bool of_result, class Gradient, class S, class Gates, class T>
MRVAE_HOST_DEVICE void add_loop(const Gradient& gradient, const S* u, std::int64_t n, const Gates& gates, S* grad_u,
                                const GateParameters<T>& grads, const GateParameters<T>& shift_grads, T* sum) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const GatePoint<T> gate = gates.point(i);
    const T value = load(u[i]), t = gates.t(i), v = of_result ? value - t : value + gates.b(i);
    const T d = gradient.at(i, of_result ? value : gate.value * v + t), du = d * gate.value;
    const T dp = d * v * (of_result ? gate.relative : gate.slope);
    gates.of.add(grads, i, dp);
    gates.shifts.add(shift_grads, i, d);
    sum[i] += du;
    store(grad_u[i], du);
  }
}

// The same for at most a chunk of channels, in one pass where the result tells: 0.43 ns an element of AVX-512 where
// rows of gates and of gradients in between take 0.55.
template <class S, class Gates, class T>
MRVAE_CLONES void add_sample(const S* grad, const S* u, std::int64_t n, Gates gates, Activation activation,
                             bool of_result, S* grad_u, GateParameters<T> grads, GateParameters<T> shift_grads,
                             T* sum) {
  if (of_result && activation == Activation::Relu) {
    return add_loop<true>(OfRelu<S>{grad}, u, n, gates, grad_u, grads, shift_grads, sum);
  }
  if (of_result) return add_loop<true>(Plain<S>{grad}, u, n, gates, grad_u, grads, shift_grads, sum);
  if (activation == Activation::None) {
    return add_loop<false>(Plain<S>{grad}, u, n, gates, grad_u, grads, shift_grads, sum);
  }
  if (activation == Activation::Relu) {
    return add_loop<false>(OfRelu<S>{grad}, u, n, gates, grad_u, grads, shift_grads, sum);
  }
  T d[chunk];
  preactivation_gradient(grad, u, n, gates, activation, d);
  add_loop<false>(Found<T>{d}, u, n, gates, grad_u, grads, shift_grads, sum);
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
template <Gate kind, int degree, class Shifts, class S, class T>
void backward_of_kind(const SampleEpilogue<T>& s, const S* grad, const S* u, const SampleEpilogueGradients<T>& out) {
  const std::int64_t units = (s.channels + unit - 1) / unit;
  const std::int64_t grain = std::max<std::int64_t>(1, serial_elements / (unit * std::max<std::int64_t>(1, s.samples)));
  at::parallel_for(0, units, grain, [&](std::int64_t first, std::int64_t last) {
    T sum[chunk], weight[degree * chunk], offset[chunk], total[chunk];
    T shift_weight[degree * chunk], shift_offset[chunk];
    const GateParameters<T> sums{weight, offset, chunk, degree}, shift_sums{shift_weight, shift_offset, chunk, degree};
    S unwanted[chunk];
    const T zeros[chunk] = {};
    const std::int64_t end = std::min(s.channels, last * unit);
    for (std::int64_t begin = first * unit; begin < end; begin += chunk) {
      const std::int64_t size = std::min(chunk, end - begin);
      for (T* values : {sum, offset, shift_offset, total}) std::fill_n(values, size, T(0));
      for (int k = 0; k < degree; ++k) {
        std::fill_n(sums.row(k), size, T(0));
        std::fill_n(shift_sums.row(k), size, T(0));
      }
      const T* bias = s.bias == nullptr ? zeros : s.bias + begin;
      for (std::int64_t n = 0; n < s.samples; ++n) {
        const std::int64_t at = n * s.channels + begin;
        const MadeGates<kind, degree, Shifts, T> gates{
            {s.gates.from(begin), s.eta[n]}, bias, Shifts(s.shifts, s.eta[n]).from(begin)};
        add_sample(grad + at, u + at, size, gates, s.activation, s.of_result,
                   out.u == nullptr ? unwanted : static_cast<S*>(out.u) + at, sums, shift_sums, sum);
        if ((n + 1) % sum_samples == 0 || n + 1 == s.samples) move_sums(sum, total, size);
      }
      for (const auto& [from, to] : {std::pair{sums, out.gates}, {shift_sums, out.shifts}}) {
        if (to.weight == nullptr) continue;
        for (int k = 0; k < degree; ++k) std::copy_n(from.row(k), size, to.row(k) + begin);
        std::copy_n(from.bias, size, to.bias + begin);
      }
      if (out.bias != nullptr) std::copy_n(total, size, out.bias + begin);
    }
  });
}

template <class S, class T>
void backward(const SampleEpilogue<T>& s, const S* grad, const S* u, const SampleEpilogueGradients<T>& out) {
  with_made(s, [&]<class Shifts>(auto kind, auto degree, Shifts*) {
    backward_of_kind<kind, degree, Shifts>(s, grad, u, out);
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
