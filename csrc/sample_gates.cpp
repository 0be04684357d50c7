#include "sample_gates.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"

namespace mrvae {
namespace {

template <class T>
cpu::SampleEpilogue<T> epilogue_of(const Tensor& u, const Tensor& bias, const SampleGates& gates,
                                   Activation activation) {
  const GateSource& source = *gates.source;
  const auto all = gate_parameters<T>(source.weight, source.bias);
  return {u.size(0), u.size(1), all.from(gates.offset), source.eta.const_data_ptr<T>(), gates.kind, data<T>(bias),
          activation, gates.shift < 0 ? GateParameters<const T>{} : all.from(gates.shift)};
}

Tensor bias_operand(const OptionalTensor& bias, const SampleGates& gates) {
  return given(bias) ? operand(*bias, gates.source->weight.scalar_type()) : Tensor();
}

// By p at both ends of the range of eta, between which p and the gate are monotonic; of a polynomial, by a bound of it.
template <class T>
bool divide(const SampleGates& gates) {
  // e^p / 2, which is less than the gate, is far above the least divisor here
  constexpr T lowest = std::is_same_v<T, double> ? -600 : -60;
  const GateSource& source = *gates.source;
  const auto with = gate_parameters<T>(source.weight, source.bias).from(gates.offset);
  const T *w = with.weight, *c = with.bias;
  const T* eta = source.eta.const_data_ptr<T>();
  T low = eta[0], high = eta[0], sum = 0;
  for (std::int64_t n = 0; n < source.eta.numel(); ++n) {
    low = std::min(low, eta[n]);
    high = std::max(high, eta[n]);
    sum += eta[n];
  }
  if (!std::isfinite(sum)) return false;
  bool all = true;
  const auto each = [&](const auto& divides) {
    if (with.degree == 1) {
      for (std::int64_t i = 0; i < gates.size; ++i) all &= divides(w[i] * low + c[i], w[i] * high + c[i]);
      return;
    }
    T most[gate_degrees] = {};
    for (std::int64_t n = 0; n < source.eta.numel(); ++n) {
      for (int k = 0; k < with.degree; ++k) most[k] = std::max(most[k], std::abs(polynomial(k, eta[n])));
    }
    for (std::int64_t i = 0; i < gates.size; ++i) {
      T bound = c[i];
      for (int k = 0; k < with.degree; ++k) bound -= std::abs(with.row(k)[i]) * most[k];
      all &= divides(bound, bound);
    }
  };
  switch (gates.kind) {
    case Gate::Sigmoid:
    case Gate::Softplus: each([](T p, T q) { return (p >= lowest) & (q >= lowest); }); break;
    // of the smallest p < 0 the root is no small divisor, and a closed gate has no gradient
    case Gate::Sqrt: each([](T p, T q) { return (p == p) & (q == q); }); break;
    case Gate::Identity: return false;  // anything, and no gate of a network is one
  }
  return all;
}

}  // namespace

std::shared_ptr<const GateSource> GateSource::make(const Tensor& weight, const Tensor& bias, const Tensor& eta) {
  // of a single sample the gate is one for many elements again, as of one beta
  if (eta.dim() != 1 || eta.numel() < 2 || on_gpu(weight)) return nullptr;
  if (eta.requires_grad() && records()) return nullptr;
  const auto dtype = gate_dtype(weight.scalar_type());
  if (weight.scalar_type() != dtype || bias.scalar_type() != dtype) return nullptr;
  const auto source = std::make_shared<GateSource>();
  for (const Tensor* tensor : {&weight, &bias, &eta}) {
    if (tensor->is_inference()) return nullptr;
    source->origins_.push_back({*tensor, std::uint32_t(tensor->_version())});
  }
  source->weight = operand(weight, dtype);
  source->bias = operand(bias, dtype);
  source->eta = operand(eta, dtype);
  return source;
}

void GateSource::check_unchanged() const {
  for (const Origin& origin : origins_) {
    TORCH_CHECK(std::uint32_t(origin.tensor._version()) == origin.version,
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "weight, bias or eta of a network's gates, of shape ", origin.tensor.sizes(), ", is at version ",
                origin.tensor._version(), "; expected version ", origin.version);
  }
}

bool SampleGates::fit(const Tensor& x, const Tensor& w, const OptionalTensor& b) const {
  if (given(b) && !(b->dim() == 1 && b->size(0) == size && b->is_cpu())) return false;
  return w.is_cpu() && x.dim() == 2 && w.dim() == 2 && w.size(0) == size && x.size(0) == source->eta.numel() && x.is_cpu() &&
         x.scalar_type() != at::kHalf && gate_dtype(x.scalar_type()) == source->weight.scalar_type();
}

Tensor SampleGates::values() const {
  const Tensor &weight = source->weight, &bias = source->bias, &eta = source->eta;
  const Tensor result = at::empty({eta.numel(), size}, weight.options().requires_grad(false));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::gates_forward<T>({{offset, size, kind, result.mutable_data_ptr<T>()}}, gate_parameters<T>(weight, bias),
                          eta.const_data_ptr<T>(), eta.numel());
  };
  weight.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return result;
}

bool SampleGates::divide() const {
  return source->weight.scalar_type() == at::kDouble ? mrvae::divide<double>(*this) : mrvae::divide<float>(*this);
}

std::vector<SampleGates> slices_of(const std::shared_ptr<const GateSource>& source, IntArrayRef sizes,
                                   IntArrayRef kinds) {
  std::vector<SampleGates> slices;
  slices.reserve(sizes.size());
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    slices.push_back({source, offset, sizes[i], Gate(kinds[i])});
    offset += sizes[i];
  }
  return slices;
}

void add_sums(IntArrayRef sizes, TensorList sums, const Tensor& grad_weight, const Tensor& grad_bias) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    GateParameters<T> to = gate_gradients<T>(grad_weight, grad_bias);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const std::int64_t size = sizes[i];
      if (sums[i].defined()) {
        const Tensor dense = sums[i].contiguous();  // the engine's sum of two layers' may be anything
        const T* from = dense.const_data_ptr<T>();
        const auto add = [&](T* target) {
          for (std::int64_t c = 0; c < size; ++c) target[c] += from[c];
          from += size;
        };
        for (int k = 0; k < to.degree; ++k) add(to.row(k));
        add(to.bias);
      }
      to = to.from(size);
    }
  };
  grad_weight.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

Tensor sample_epilogue(const Tensor& u, const OptionalTensor& bias, const SampleGates& gates, Activation activation,
                       bool u_is_free) {
  const Tensor values = u.contiguous(), b = bias_operand(bias, gates);
  const Tensor y = u_is_free ? values : at::empty_like(values);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::sample_epilogue_forward<T>(storage_of(values), epilogue_of<T>(values, b, gates, activation),
                                    values.const_data_ptr(), y.mutable_data_ptr());
  };
  gates.source->weight.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return y;
}

EpilogueGrads sample_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                       const SampleGates& gates, Activation activation, std::array<bool, 4> mask,
                                       EpilogueBackward how) {
  TORCH_CHECK_VALUE(grad.sizes() == u.sizes(), "epilogue_backward: grad has shape ", grad.sizes(), "; expected ",
                    u.sizes(), ", that of u");
  const auto options = gates.source->weight.options().requires_grad(false);
  const Tensor values = u.contiguous(), b = how.of_result ? Tensor() : bias_operand(bias, gates);
  Tensor incoming = grad;
  if (!same_layout(grad, values)) incoming = at::empty_like(values).copy_(grad);
  Tensor grad_u, grad_bias, sums, shift_sums;
  if (mask[0]) grad_u = how.overwrite ? incoming : at::empty_like(values);
  if (mask[1] && given(bias)) grad_bias = at::empty({bias->numel()}, options);
  if (mask[2]) sums = at::empty({gates.sums(), gates.size}, options);
  if (mask[3] && gates.shift >= 0) shift_sums = at::empty({gates.sums(), gates.size}, options);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::SampleEpilogue<T> epilogue = epilogue_of<T>(values, b, gates, activation);
    epilogue.of_result = how.of_result;
    const auto target = [&](const Tensor& of) -> GateParameters<T> {
      if (!of.defined()) return {};
      T* rows = of.mutable_data_ptr<T>();
      return {rows, rows + epilogue.gates.degree * gates.size, gates.size, epilogue.gates.degree};
    };
    cpu::sample_epilogue_backward<T>(
        storage_of(values), epilogue, incoming.const_data_ptr(), values.const_data_ptr(),
        {grad_u.defined() ? grad_u.mutable_data_ptr() : nullptr, target(sums), mutable_data<T>(grad_bias),
         target(shift_sums)});
  };
  options.dtype() == at::kDouble ? run(0.0) : run(0.0f);
  if (grad_bias.defined()) grad_bias = grad_bias.to(bias->scalar_type());
  return {grad_u, grad_bias, sums, shift_sums};
}

}  // namespace mrvae
