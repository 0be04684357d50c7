// gated_linear and gated_convolution: one node each over the library's own product (product_node.h), or the fused kernels
// of GPU tensors (fused_products.h).
#include "product_node.h"

namespace mrvae {
namespace {

// In terms of other operators, for whatever is not an ordinary eager call: each part is visible to the tracer.
template <class Product>
Tensor decomposed(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const Tensor& gate, const OptionalTensor& shift, Activation activation, Strategy strategy) {
  if (strategy == Strategy::Epilogue) {
    const Tensor u = product.traced(x, weight, std::nullopt);
    const std::int64_t axis = Product::channel_axis < 0 ? u.dim() - 1 : Product::channel_axis;
    // of a sparse x, or one with the negative bit, u is an ordinary tensor with a history
    const std::initializer_list<const Tensor*> parts = {&u, pointer(bias), &gate, pointer(shift)};
    if (direct(parts) && recording(parts)) {
      return epilogue_autograd(u, bias, gate, shift, axis, activation_name(activation));
    }
    return call_epilogue(u, bias, gate, shift, axis, activation_name(activation));
  }
  const auto [weights, biases] =
      call_fold(weight, OptionalTensorList({bias}), gate, OptionalTensorList({shift}), product.fold_groups);
  const OptionalTensor folded_bias = given(bias) || given(shift) ? OptionalTensor(biases[0]) : std::nullopt;
  return activate(product.traced(x, weights[0], folded_bias), activation);
}

template <class Product>
Tensor dispatch(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const Tensor& gate, const OptionalTensor& shift, std::string_view activation_text,
                std::string_view strategy_text) {
  const Activation activation = parse_activation(activation_text);
  const Strategy strategy = parse_strategy(strategy_text);
  if (strategy == Strategy::Fused) return fused_autograd(product.fused(), x, weight, bias, gate, shift, activation);
  const std::initializer_list<const Tensor*> tensors = {&x, &weight, pointer(bias), &gate, pointer(shift)};
  if (!eager(tensors)) return decomposed(product, x, weight, bias, gate, shift, activation, strategy);
  if (recording(tensors)) {
    const auto input = [](const Tensor& tensor) { return GateInput{tensor, gradient_edge(tensor)}; };
    return ProductNode<Product>::record(product, x, weight, bias, input(gate), input(shift.value_or(Tensor())), activation,
                                        strategy);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return compute(product, x, weight, bias, gate, shift, activation, strategy);
}

}  // namespace

Tensor gated_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                    const OptionalTensor& shift, std::string_view activation, std::string_view strategy) {
  return compute(LinearProduct(), x, weight, bias, gate, shift, parse_activation(activation), parse_strategy(strategy));
}

Tensor gated_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                             const OptionalTensor& shift, std::string_view activation, std::string_view strategy) {
  return dispatch(LinearProduct(), x, weight, bias, gate, shift, activation, strategy);
}

Tensor gated_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                         const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         bool transposed, IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                         std::string_view strategy) {
  return compute(ConvolutionProduct(stride, padding, dilation, transposed, output_padding, groups), x, weight, bias,
                 gate, shift, parse_activation(activation), parse_strategy(strategy));
}

Tensor gated_convolution_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                                  const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                                  std::int64_t groups, std::string_view activation, std::string_view strategy) {
  return dispatch(ConvolutionProduct(stride, padding, dilation, transposed, output_padding, groups), x, weight, bias,
                  gate, shift, activation, strategy);
}

}  // namespace mrvae
