#include "hosted_layer.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "product_node.h"

namespace mrvae {
namespace {

// Nothing between the caller and the kernels: no autocast, no transform, no mode.
bool undisturbed(c10::DeviceType device) {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set).empty() && !at::autocast::is_autocast_enabled(device);
}

// As the operator is called from Python.
struct ByOperator {
  const Tensor& x;
  const Tensor& weight;
  const OptionalTensor& bias;
  const Tensor gate;
  const OptionalTensor shift;
  std::string_view activation, strategy;

  Tensor operator()(const LinearProduct&) const {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::gated_linear", "").typed<decltype(gated_linear)>();
    return op.call(x, weight, bias, gate, shift, activation, strategy);
  }
  Tensor operator()(const ConvolutionProduct& p) const {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mrvae::gated_convolution", "")
                               .typed<decltype(gated_convolution)>();
    return op.call(x, weight, bias, gate, shift, p.stride, p.padding, p.dilation, p.transposed, p.output_padding, p.groups,
                   activation, strategy);
  }
};

// g_in x, the gate (K,) or (N, K) along this axis of x, in x's dtype
Tensor scaled(const Tensor& x, const Tensor& gate, std::int64_t axis) {
  TORCH_CHECK_VALUE(axis >= 0 && x.size(axis) == gate.size(-1), "x has shape ", x.sizes(), "; expected ", gate.size(-1),
                    " features, as many as the gate on the layer's inputs has");
  TORCH_CHECK_VALUE(gate.dim() < 2 || (axis > 0 && gate.size(0) == x.size(0)), "gate has shape ", gate.sizes(),
                    "; expected one row a sample of x, ", x.sizes(), ", or one beta");
  std::vector<std::int64_t> sizes(std::size_t(x.dim()), 1);
  sizes[std::size_t(axis)] = gate.size(-1);
  if (gate.dim() == 2) sizes[0] = gate.size(0);
  return x.mul(gate.sizes() == sizes ? gate : gate.view(sizes)).to(x.scalar_type());
}

bool batched(const LinearProduct&, const Tensor&) { return true; }
bool batched(const ConvolutionProduct& product, const Tensor& x) {
  return std::size_t(x.dim()) == product.stride.size() + 2;
}

}  // namespace

OptionalTensor HostedLayer::run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                Activation activation) const {
  const c10::intrusive_ptr<StepGates> step = stage->gates;
  if (!step || version != stage->version) return std::nullopt;
  if (!std::visit([&](const auto& p) { return batched(p, x); }, product)) return std::nullopt;
  if (inputs < 0) return run_gated(*step, x, weight, bias, activation);
  const std::int64_t axis = std::holds_alternative<LinearProduct>(product) ? x.dim() - 1 : 1;
  return run_gated(*step, scaled(x, step->variable(inputs), axis), weight, bias, activation);
}

OptionalTensor HostedLayer::run_gated(const StepGates& step, const Tensor& x, const Tensor& weight,
                                      const OptionalTensor& bias, Activation activation) const {
  if (OptionalTensor y = run_made(step, x, weight, bias, activation)) return y;
  const Tensor& values = step.value(std::size_t(gate));
  const Tensor shifts = shift < 0 ? Tensor() : step.value(std::size_t(shift));
  if (!undisturbed(x.device().type()) || !direct({&x, &weight, pointer(bias), &values, &shifts})) {
    const ByOperator call{x, weight, bias, step.variable(gate), shift < 0 ? std::nullopt : OptionalTensor(step.variable(shift)),
                          activation_name(activation), strategy == Strategy::Fold ? "fold" : "epilogue"};
    return std::visit(call, product);
  }
  return std::visit(
      [&](const auto& p) {
        const bool gated = step.gated || values.requires_grad() || (shifts.defined() && shifts.requires_grad());
        if (records() && (gated || recording({&x, &weight, pointer(bias)}))) {
          // a gate has the slope 0 where its value is 0: no gate of a network is an identity
          const GateInput g{values, gated ? step.edge(std::size_t(gate)) : Edge(), true,
                            slope_within_value(step.kind(std::size_t(gate)))};
          const GateInput t{shifts, shift < 0 || !gated ? Edge() : step.edge(std::size_t(shift))};
          return ProductNode<std::decay_t<decltype(p)>>::record(p, x, weight, bias, g, t, activation, strategy);
        }
        at::AutoDispatchBelowADInplaceOrView below;
        return compute(p, x, weight, bias, values, optional(shifts), activation, strategy);
      },
      product);
}

// A Linear that makes its gates itself, and its shifts.
OptionalTensor HostedLayer::run_made(const StepGates& step, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, Activation activation) const {
  const auto* linear = std::get_if<LinearProduct>(&product);
  if (!step.source || linear == nullptr || strategy != Strategy::Epilogue) return std::nullopt;
  SampleGates made = step.made[std::size_t(gate)];
  if (shift >= 0) made.shift = step.made[std::size_t(shift)].offset;
  if (!made.fit(x, weight, bias) || !undisturbed(x.device().type())) return std::nullopt;
  if (!direct({&x, &weight, pointer(bias)})) return std::nullopt;
  if (records() && (step.gated || recording({&x, &weight, pointer(bias)}))) {
    const GateInput g{Tensor(), step.gated ? step.sums_edge(std::size_t(gate)) : Edge(), true,
                      slope_within_value(made.kind), made};
    const GateInput t{Tensor(), shift >= 0 && step.gated ? step.sums_edge(std::size_t(shift)) : Edge()};
    return ProductNode<LinearProduct>::record(*linear, x, weight, bias, g, t, activation, strategy);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return compute(*linear, x, weight, bias, Tensor(), std::nullopt, activation, strategy, nullptr, made);
}

namespace {

// Ordinary numbers of the CPU, one after another.
bool readable(const Tensor& beta) {
  if (!beta.device().is_cpu() || beta.dim() > 1 || !beta.is_contiguous() || !eager({&beta})) return false;
  return beta.scalar_type() == at::kFloat || beta.scalar_type() == at::kDouble;
}

}  // namespace

std::optional<bool> all_positive(const Tensor& beta) {
  if (!readable(beta)) return std::nullopt;
  const auto all = [&](const auto* values) {
    return std::all_of(values, values + beta.numel(), [](auto value) { return value > 0 && std::isfinite(value); });
  };
  return beta.scalar_type() == at::kDouble ? all(beta.const_data_ptr<double>()) : all(beta.const_data_ptr<float>());
}

double standardized(double beta, double low, double high) {
  const double mean = (std::log(low) + std::log(high)) / 2, deviation = (std::log(high) - std::log(low)) / std::sqrt(12.0);
  return (std::log(beta) - mean) / deviation;
}

OptionalTensor standardized(const Tensor& beta, double low, double high, at::ScalarType dtype) {
  if (!readable(beta) || beta.requires_grad() || beta._fw_grad(0).defined() || beta.numel() == 0) return std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  const Tensor eta = at::empty(beta.sizes(), beta.options().dtype(dtype));
  constexpr double slack = 1e-4;  // float32 rounds 0.01 to 0.00999999978
  bool inside = true;
  const auto fill = [&](const auto* from, auto* to) {
    for (std::int64_t i = 0; i < beta.numel(); ++i) {
      inside = inside && from[i] >= low * (1 - slack) && from[i] <= high * (1 + slack);
      to[i] = std::decay_t<decltype(to[0])>(standardized(double(from[i]), low, high));
    }
  };
  const auto from = [&](const auto* values) {
    dtype == at::kDouble ? fill(values, eta.mutable_data_ptr<double>()) : fill(values, eta.mutable_data_ptr<float>());
  };
  beta.scalar_type() == at::kDouble ? from(beta.const_data_ptr<double>()) : from(beta.const_data_ptr<float>());
  return inside ? OptionalTensor(eta) : std::nullopt;
}

}  // namespace mrvae
