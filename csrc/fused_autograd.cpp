// Autograd of the fused products: one node, whose passes call the kernels in an eager step and the operators where
// something traces.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "fused_products.h"

namespace mrvae {
namespace {

using Results = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Through the dispatcher what is not there is an empty tensor: tracing wants a tensor for each result.
Tensor present(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor : at::empty({0}, like.options());
}

Results results(FusedResult out) {
  const Tensor kept = present(out.kept, out.y);
  return {std::move(out.y), kept};
}

Gradients gradients(FusedGrads out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& gate) {
  return {present(out.x, x), present(out.weight, weight), present(out.bias, given(bias) ? *bias : weight),
          present(out.gate, gate), present(out.shift, gate)};
}

template <class F>
c10::TypedOperatorHandle<F> operator_of(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

FusedResult forward_of(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const Tensor& gate, const OptionalTensor& shift, Activation activation, bool keep) {
  if (eager({&x, &weight, pointer(bias), &gate, pointer(shift)})) {
    return fused_forward(layer, x, weight, bias, gate, shift, activation, keep);
  }
  const std::string_view name = activation_name(activation);
  Results out;
  if (layer.linear) {
    static const auto op = operator_of("mrvae::fused_linear", fused_linear);
    out = op.call(x, weight, bias, gate, shift, name, keep);
  } else {
    static const auto op = operator_of("mrvae::fused_convolution", fused_convolution);
    out = op.call(x, weight, bias, gate, shift, layer.stride, layer.padding, layer.dilation, layer.transposed,
                  layer.output_padding, layer.groups, name, keep);
  }
  return {std::get<0>(out), std::get<1>(out)};
}

FusedGrads backward_of(const FusedLayer& layer, const Tensor& grad, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift, const Tensor& y,
                       const Tensor& kept, Activation activation, std::array<bool, 5> mask) {
  if (eager({&grad, &x, &weight, pointer(bias), &gate, pointer(shift), &y, &kept})) {
    return fused_backward(layer, grad, x, weight, bias, gate, shift, y, kept, activation, mask);
  }
  const std::string_view name = activation_name(activation);
  const Tensor state = present(kept, grad);
  Gradients out;
  if (layer.linear) {
    static const auto op = operator_of("mrvae::fused_linear_backward", fused_linear_backward);
    out = op.call(grad, x, weight, bias, gate, shift, optional(y), state, name, mask);
  } else {
    static const auto op = operator_of("mrvae::fused_convolution_backward", fused_convolution_backward);
    out = op.call(grad, x, weight, bias, gate, shift, optional(y), state, layer.stride, layer.padding, layer.dilation,
                  layer.transposed, layer.output_padding, layer.groups, name, mask);
  }
  return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out), std::get<4>(out)};
}

struct FusedNode : torch::autograd::Function<FusedNode> {
  enum Saved { X, Weight, Bias, Gate, Shift, Result, Kept };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               const Tensor& gate, const OptionalTensor& shift, const FusedLayer& layer,
                               Activation activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    const FusedResult out = forward_of(layer, x, weight, bias, gate, shift, activation, /*keep=*/true);
    const Tensor kept = present(out.kept, out.y);
    const bool reads_result = gate.dim() == 1 && activation != Activation::None && !saves_argument(activation);
    ctx->mark_non_differentiable({kept});
    ctx->set_materialize_grads(false);  // else each backward pass fills a tensor of kept's size with zeros
    ctx->save_for_backward({x, weight, bias.value_or(Tensor()), gate, shift.value_or(Tensor()),
                            reads_result ? out.y : Tensor(), kept});
    std::vector<std::int64_t> plan{std::int64_t(activation), layer.linear, layer.transposed, layer.groups};
    for (const auto* values : {&layer.stride, &layer.padding, &layer.dilation, &layer.output_padding}) {
      plan.insert(plan.end(), values->begin(), values->end());
    }
    ctx->saved_data["plan"] = plan;
    return {out.y, kept};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(7);
    refuse_tangents("fused product", {&grads[0]});
    const auto saved = ctx->get_saved_variables();
    const auto plan = ctx->saved_data["plan"].toIntVector();
    const auto part = [&](std::size_t k) { return IntArrayRef(plan).slice(4 + 2 * k, 2); };
    FusedLayer layer(part(0), part(1), part(2), plan[2] != 0, part(3), plan[3]);
    layer.linear = plan[1] != 0;
    std::array<bool, 5> wanted{};  // edges exist for those that were given
    std::size_t edge = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    variable_list out;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const FusedGrads found = backward_of(layer, grads[0], saved[X], saved[Weight], optional(saved[Bias]), saved[Gate],
                                           optional(saved[Shift]), saved[Result], saved[Kept], Activation(plan[0]),
                                           wanted);
      out = {found.x, found.weight, found.bias, found.gate, found.shift};
    }
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      if (!wanted[i]) out[i] = Tensor();
    }
    out.resize(7);  // none for the layer and the activation
    return once_differentiable(layer.linear ? "gated_linear" : "gated_convolution", std::move(out));
  }
};

Results recorded(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& gate, const OptionalTensor& shift, Activation activation, bool keep) {
  if (recording({&x, &weight, pointer(bias), &gate, pointer(shift)})) {
    const auto out = FusedNode::apply(x, weight, bias, gate, shift, layer, activation);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return results(forward_of(layer, x, weight, bias, gate, shift, activation, keep));
}

}  // namespace

Results fused_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                     const OptionalTensor& shift, std::string_view activation, bool keep) {
  return results(fused_forward({}, x, weight, bias, gate, shift, parse_activation(activation), keep));
}

Results fused_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                              const OptionalTensor& shift, std::string_view activation, bool keep) {
  return recorded({}, x, weight, bias, gate, shift, parse_activation(activation), keep);
}

Gradients fused_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const Tensor& gate, const OptionalTensor& shift, const OptionalTensor& y,
                                const Tensor& kept, std::string_view activation, std::array<bool, 5> mask) {
  return gradients(fused_backward({}, grad, x, weight, bias, gate, shift, y.value_or(Tensor()), kept,
                                  parse_activation(activation), mask),
                   x, weight, bias, gate);
}

Results fused_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                          const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          bool transposed, IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                          bool keep) {
  return results(fused_forward({stride, padding, dilation, transposed, output_padding, groups}, x, weight, bias, gate,
                               shift, parse_activation(activation), keep));
}

Results fused_convolution_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gate, const OptionalTensor& shift, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                   IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                                   bool keep) {
  return recorded({stride, padding, dilation, transposed, output_padding, groups}, x, weight, bias, gate, shift,
                  parse_activation(activation), keep);
}

Gradients fused_convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                                     const OptionalTensor& y, const Tensor& kept, IntArrayRef stride,
                                     IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                     IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                                     std::array<bool, 5> mask) {
  const FusedLayer layer(stride, padding, dilation, transposed, output_padding, groups);
  return gradients(fused_backward(layer, grad, x, weight, bias, gate, shift, y.value_or(Tensor()), kept,
                                  parse_activation(activation), mask),
                   x, weight, bias, gate);
}

Tensor fused_autograd(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& gate, const OptionalTensor& shift, Activation activation) {
  const std::initializer_list<const Tensor*> tensors = {&x, &weight, pointer(bias), &gate, pointer(shift)};
  const bool keep = recording(tensors);
  if (eager(tensors)) {
    if (keep) return FusedNode::apply(x, weight, bias, gate, shift, layer, activation)[0];
    at::AutoDispatchBelowADInplaceOrView below;
    return fused_forward(layer, x, weight, bias, gate, shift, activation, false).y;
  }
  return forward_of(layer, x, weight, bias, gate, shift, activation, keep).y;
}

}  // namespace mrvae
