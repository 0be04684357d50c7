// gated_linear and gated_convolution: one node each over the library's own product.
//
//   fold      y = activation(product(x, W') + b'),  W' = g W, b' = g b + t
//   epilogue  y = activation(g * (u + b) + t),      u = product(x, W)
//   fused     the same in one kernel, of GPU tensors: see fused_products.h
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <numeric>

#include "fused_products.h"

namespace mrvae {
namespace {

struct ProductGrads {
  Tensor x, weight, bias;
};

struct LinearProduct {
  static constexpr const char* name = "gated_linear";
  static constexpr std::int64_t channel_axis = -1, fold_groups = 0;

  static LinearProduct decode(AutogradContext*) { return {}; }
  FusedLayer fused() const { return {}; }
  void save(AutogradContext*) const {}

  static std::int64_t rows(const Tensor& x) {
    const auto sizes = x.sizes();
    return std::accumulate(sizes.begin(), sizes.end() - 1, std::int64_t(1), std::multiplies<>());
  }
  static Tensor matrix(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({rows(x), x.size(-1)}); }

  Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    const Tensor flat = matrix(x), transposed = weight.t();
    const Tensor y = bias.defined() ? at::addmm(bias, flat, transposed) : at::mm(flat, transposed);
    if (x.dim() == 2) return y;
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    return y.view(sizes);
  }

  ProductGrads backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
    const Tensor flat = matrix(grad);
    ProductGrads out;
    if (mask[0]) {
      out.x = flat.mm(weight);
      if (grad.dim() != 2) {
        auto sizes = grad.sizes().vec();
        sizes.back() = weight.size(1);
        out.x = out.x.view(sizes);
      }
    }
    if (mask[1]) out.weight = flat.t().mm(matrix(x));
    if (mask[2]) out.bias = flat.sum(0);
    return out;
  }

  Tensor traced(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return at::linear(x, weight, bias);
  }

  void check(const Tensor& x, const Tensor& weight) const {
    TORCH_CHECK_VALUE(weight.dim() == 2, name, ": weight has shape ", weight.sizes(), "; expected (C, K)");
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), name, ": x has shape ", x.sizes(),
                      "; expected (..., ", weight.size(1), "), the weight's input features");
  }
};

struct ConvolutionProduct {
  static constexpr const char* name = "gated_convolution";
  static constexpr std::int64_t channel_axis = 1;
  std::vector<std::int64_t> stride, padding, dilation, output_padding;
  bool transposed;
  std::int64_t groups, fold_groups;

  ConvolutionProduct(IntArrayRef s, IntArrayRef p, IntArrayRef d, bool t, IntArrayRef o, std::int64_t g)
      : stride(s.vec()), padding(p.vec()), dilation(d.vec()), output_padding(o.vec()), transposed(t), groups(g),
        fold_groups(t ? g : 0) {}

  FusedLayer fused() const { return {stride, padding, dilation, transposed, output_padding, groups}; }
  void save(AutogradContext* ctx) const {
    std::vector<std::int64_t> geometry{transposed, groups};
    for (const auto* values : {&stride, &padding, &dilation, &output_padding}) {
      geometry.insert(geometry.end(), values->begin(), values->end());
    }
    ctx->saved_data["geometry"] = geometry;
  }
  static ConvolutionProduct decode(AutogradContext* ctx) {
    const auto geometry = ctx->saved_data["geometry"].toIntVector();
    const std::size_t axes = (geometry.size() - 2) / 4;
    const auto part = [&](std::size_t k) { return IntArrayRef(geometry).slice(2 + k * axes, axes); };
    return {part(0), part(1), part(2), geometry[0] != 0, part(3), geometry[1]};
  }

  Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    return at::convolution(x, weight, optional(bias), stride, padding, dilation, transposed, output_padding, groups);
  }

  ProductGrads backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
    ProductGrads out;
    if (!mask[0] && !mask[1] && !mask[2]) return out;
    const std::int64_t channels[] = {grad.size(1)};
    std::tie(out.x, out.weight, out.bias) =
        at::convolution_backward(grad, x, weight, at::OptionalIntArrayRef(IntArrayRef(channels)), stride, padding,
                                 dilation, transposed, output_padding, groups, mask);
    return out;
  }

  Tensor traced(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return at::convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  void check(const Tensor& x, const Tensor& weight) const {
    const auto axes = stride.size();
    TORCH_CHECK_VALUE(axes >= 1 && axes <= 3 && padding.size() == axes && dilation.size() == axes &&
                          output_padding.size() == axes && groups >= 1,
                      name, ": got ", axes, " strides, ", padding.size(), " paddings, ", dilation.size(), " dilations, ",
                      output_padding.size(), " output paddings and groups = ", groups,
                      "; expected one of each a spatial axis, 1 to 3, and groups >= 1");
    TORCH_CHECK_VALUE(x.dim() == std::int64_t(axes) + 2 && weight.dim() == x.dim(), name, ": x has shape ", x.sizes(),
                      " and weight ", weight.sizes(), "; expected (N, C_in, ...) and a weight with ", axes,
                      " spatial axes");
    const std::int64_t inputs = transposed ? weight.size(0) : weight.size(1) * groups;
    TORCH_CHECK_VALUE(x.size(1) == inputs, name, ": x has shape ", x.sizes(), "; expected ", inputs,
                      " channels in axis 1, by the weight's shape ", weight.sizes(), " and groups = ", groups);
  }
};

template <class Product>
void check(const Product& product, const Tensor& x, const Tensor& weight, const Tensor& gate, Strategy strategy) {
  check_floating(Product::name, "x", x);
  check_floating(Product::name, "weight", weight);
  check_device(Product::name, "weight", weight, x);
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), Product::name, ": x has dtype ", x.scalar_type(),
                   " and weight ", weight.scalar_type(), "; expected the same dtype");
  product.check(x, weight);
  TORCH_CHECK_VALUE(gate.dim() == 1 || (gate.dim() == 2 && x.dim() >= 2), Product::name, ": gate has shape ",
                    gate.sizes(), "; expected (C,), or (N, C) for x with N samples in axis 0");
  TORCH_CHECK_VALUE(strategy == Strategy::Epilogue || gate.dim() == 1, Product::name, ": gate has shape ", gate.sizes(),
                    ", one beta a sample, which cannot be folded into the weight; expected strategy epilogue or fused");
}

// What the forward pass leaves for the backward pass.
struct Leftovers {
  Tensor folded;  // fold: W'
  Tensor state;   // fold: what the activation's gradient needs; epilogue: u
};

template <class Product>
Tensor compute(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const Tensor& gate, const OptionalTensor& shift, Activation activation, Strategy strategy,
               bool keep_state, Leftovers* leftovers) {
  if (strategy == Strategy::Fused) {
    return fused_forward(product.fused(), x, weight, bias, gate, shift, activation, /*keep=*/false).y;
  }
  check(product, x, weight, gate, strategy);
  if (strategy == Strategy::Epilogue) {
    const Tensor u = product.forward(x, weight, Tensor());
    if (keep_state) leftovers->state = u;
    const std::int64_t axis = Product::channel_axis < 0 ? u.dim() - 1 : Product::channel_axis;
    return call_epilogue(u, bias, gate, shift, axis, activation_name(activation), /*u_is_free=*/!keep_state);
  }
  const auto [folded, folded_bias] = fold_layer(
      {weight, bias.value_or(Tensor()), gate, shift.value_or(Tensor()), product.fold_groups});
  const Tensor z = product.forward(x, folded, folded_bias), y = activate_(z, activation);
  if (leftovers != nullptr) {
    leftovers->folded = folded;
    if (keep_state) leftovers->state = saves_argument(activation) ? z : y;
  }
  return y;
}

template <class Product>
struct ProductNode : torch::autograd::Function<ProductNode<Product>> {
  enum Saved { X, Weight, Bias, Gate, Shift, FoldedWeight, State };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& gate, const OptionalTensor& shift, const Product& product, Activation activation,
                        Strategy strategy) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool fold = strategy == Strategy::Fold, active = activation != Activation::None;
    Leftovers leftovers;
    const Tensor y = compute(product, x, weight, bias, gate, shift, activation, strategy,
                             active || (!fold && gate.requires_grad()), &leftovers);
    ctx->save_for_backward({x, weight, bias.value_or(Tensor()), gate, shift.value_or(Tensor()), leftovers.folded,
                            leftovers.state});
    ctx->saved_data["plan"] = std::int64_t(activation) * 2 + std::int64_t(fold);
    product.save(ctx);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto plan = ctx->saved_data["plan"].toInt();
    const Product product = Product::decode(ctx);
    std::array<bool, 5> wanted{};  // x, weight, bias, gate, shift; edges exist for those that were given
    std::size_t edge = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    variable_list gradients;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const auto activation = Activation(plan / 2);
      gradients = plan % 2 != 0 ? through_fold(product, grads[0], saved, activation, wanted)
                                : through_epilogue(product, grads[0], saved, activation, wanted);
    }
    gradients.resize(8);  // none for the product, the activation and the strategy
    return once_differentiable(Product::name, std::move(gradients));
  }

 private:
  static variable_list through_epilogue(const Product& product, const Tensor& grad, const variable_list& saved,
                                        Activation activation, const std::array<bool, 5>& wanted) {
    // without gate gradient and activation u has no influence, and was not kept
    const Tensor& u = saved[State].defined() ? saved[State] : grad;
    const std::int64_t axis = Product::channel_axis < 0 ? u.dim() - 1 : Product::channel_axis;
    auto [grad_u, grad_bias, grad_gate, grad_shift] = call_epilogue_backward(
        grad, u, optional(saved[Bias]), saved[Gate], optional(saved[Shift]), axis, activation_name(activation),
        {wanted[X] || wanted[Weight], wanted[Bias], wanted[Gate], wanted[Shift]});
    ProductGrads through;
    if (wanted[X] || wanted[Weight]) {
      through = product.backward(grad_u, saved[X], saved[Weight], {wanted[X], wanted[Weight], false});
    }
    return {through.x, through.weight, grad_bias, grad_gate, grad_shift};
  }

  static variable_list through_fold(const Product& product, const Tensor& grad, const variable_list& saved,
                                    Activation activation, const std::array<bool, 5>& wanted) {
    const Tensor grad_z = activation_gradient(grad, saved[State], activation);
    const bool weight = wanted[Weight] || wanted[Gate];
    const bool bias = wanted[Bias] || wanted[Shift] || (wanted[Gate] && saved[Bias].defined());
    const ProductGrads through = product.backward(grad_z, saved[X], saved[FoldedWeight], {wanted[X], weight, bias});
    if (!weight && !bias) return {through.x};
    const auto [grad_weight, grad_bias, grad_gate, grad_shift] = fold_layer_backward(
        {saved[Weight], saved[Bias], saved[Gate], saved[Shift], product.fold_groups},
        {through.weight, through.bias, wanted[Weight], wanted[Bias], wanted[Gate], wanted[Shift], /*overwrite=*/true});
    return {through.x, grad_weight, grad_bias, grad_gate, grad_shift};
  }
};

// In terms of other operators, for whatever is not an ordinary eager call: each part is visible to the tracer.
template <class Product>
Tensor decomposed(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const Tensor& gate, const OptionalTensor& shift, Activation activation, Strategy strategy) {
  if (strategy == Strategy::Epilogue) {
    const Tensor u = product.traced(x, weight, std::nullopt);
    const std::int64_t axis = Product::channel_axis < 0 ? u.dim() - 1 : Product::channel_axis;
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
    return ProductNode<Product>::apply(x, weight, bias, gate, shift, product, activation, strategy);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return compute(product, x, weight, bias, gate, shift, activation, strategy, false, nullptr);
}

}  // namespace

Tensor gated_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                    const OptionalTensor& shift, std::string_view activation, std::string_view strategy) {
  return compute(LinearProduct(), x, weight, bias, gate, shift, parse_activation(activation), parse_strategy(strategy),
                 false, nullptr);
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
                 gate, shift, parse_activation(activation), parse_strategy(strategy), false, nullptr);
}

Tensor gated_convolution_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                                  const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                                  std::int64_t groups, std::string_view activation, std::string_view strategy) {
  return dispatch(ConvolutionProduct(stride, padding, dilation, transposed, output_padding, groups), x, weight, bias,
                  gate, shift, activation, strategy);
}

}  // namespace mrvae
