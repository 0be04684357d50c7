#include "sample_gates.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

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

// The least and the greatest eta, both NaN where one of them is no finite number.
template <class T>
std::pair<T, T> range_of(const Tensor& eta) {
  const T* values = eta.const_data_ptr<T>();
  T low = values[0], high = low, nothing = 0;
  for (std::int64_t n = 0; n < eta.numel(); ++n) {
    low = std::min(low, values[n]);
    high = std::max(high, values[n]);
    nothing += T(0) * values[n];
  }
  return {low + nothing, high + nothing};
}

template <class T>
bool divide(const SampleGates& gates) {
  const GateSource& source = *gates.source;
  const auto all = gate_parameters<T>(source.weight, source.bias);
  const auto [low, high] = range_of<T>(source.eta);
  if (gates.shift < 0) return cpu::divisible(all.from(gates.offset), gates.kind, gates.size, low, high);
  return cpu::separable(all.from(gates.offset), gates.kind, all.from(gates.shift), gates.size, low, high);
}

// A layer's gates and shifts as an operator is told them; ValueError and TypeError for what does not fit u.
SampleGates told(const char* op, const Tensor& u, const OptionalTensor& bias, const Tensor& weight,
                 const Tensor& gate_bias, const Tensor& eta, std::int64_t gate, std::int64_t shift, std::int64_t kind) {
  const auto type = u.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op, ": u has dtype ", type,
                   "; expected float32, float64 or bfloat16");
  const auto dtype = gate_dtype(type);
  for (const Tensor* part : {&weight, &gate_bias, &eta}) {
    check_floating(op, "weight, gate_bias or eta", *part);
    check_device(op, "weight, gate_bias or eta", *part, u);
    TORCH_CHECK_TYPE(gate_dtype(part->scalar_type()) == dtype, op, ": u has dtype ", type, " and a gate's weight, bias or "
                     "eta ", part->scalar_type(), "; expected gates of ", dtype);
  }
  TORCH_CHECK_VALUE(u.dim() == 2, op, ": u has shape ", u.sizes(), "; expected (N, C)");
  const bool flat = weight.dim() == 1 || (weight.dim() == 2 && weight.size(0) >= 1 && weight.size(0) <= gate_degrees);
  TORCH_CHECK_VALUE(flat && gate_bias.dim() == 1 && weight.size(-1) == gate_bias.size(0), op, ": weight and gate_bias have "
                    "shapes ", weight.sizes(), " and ", gate_bias.sizes(), "; expected (S,) or (degree, S), and (S,)");
  TORCH_CHECK_VALUE(eta.dim() == 1 && eta.size(0) == u.size(0), op, ": eta has shape ", eta.sizes(), "; expected ",
                    u.size(0), " values, one a row of u");
  const std::int64_t last = gate_bias.size(0) - u.size(1);
  TORCH_CHECK_VALUE(gate >= 0 && gate <= last && shift >= -1 && shift <= last, op, ": the gates begin at ", gate,
                    " and the shifts at ", shift, "; expected at most ", last, ", so that ", u.size(1), " follow");
  TORCH_CHECK_VALUE(kind >= 0 && kind < std::int64_t(Gate::Identity), op, ": kind is ", kind, "; expected 0, 1 or 2");
  TORCH_CHECK_VALUE(!given(bias) || (bias->dim() == 1 && bias->size(0) == u.size(1)), op, ": bias has shape ",
                    given(bias) ? bias->sizes() : IntArrayRef(), "; expected (C,) of u, ", u.sizes());
  const auto source = std::make_shared<GateSource>();
  source->weight = operand(weight, dtype);
  source->bias = operand(gate_bias, dtype);
  source->eta = operand(eta, dtype);
  return {source, gate, u.size(1), Gate(kind), shift};
}

}  // namespace

Tensor sampled_epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& weight, const Tensor& gate_bias,
                        const Tensor& eta, std::int64_t gate, std::int64_t shift, std::int64_t kind,
                        std::string_view activation) {
  const SampleGates gates = told("sampled_epilogue", u, bias, weight, gate_bias, eta, gate, shift, kind);
  return sample_epilogue(u, bias, gates, parse_activation(activation), /*u_is_free=*/false);
}

EpilogueGrads sampled_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                        const Tensor& weight, const Tensor& gate_bias, const Tensor& eta,
                                        std::int64_t gate, std::int64_t shift, std::int64_t kind,
                                        std::string_view activation, bool of_result, std::array<bool, 4> mask) {
  const SampleGates gates = told("sampled_epilogue_backward", u, bias, weight, gate_bias, eta, gate, shift, kind);
  const Activation act = parse_activation(activation);
  TORCH_CHECK_VALUE(!of_result || act == Activation::None || act == Activation::Relu,
                    "sampled_epilogue_backward: the activation is ", activation, "; of the result expected none or relu");
  EpilogueBackward how;
  how.of_result = of_result;
  return sample_epilogue_backward(grad, u, bias, gates, act, mask, how);
}

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
