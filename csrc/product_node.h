// A gated product, computed and recorded as one node.
//
//   fold      y = activation(product(x, W') + b'),  W' = g W, b' = g b + t
//   epilogue  y = activation(g * (u + b) + t),      u = product(x, W)
//
// What the backward pass needs besides the inputs is kept without memory of its own where that can be: of an epilogue, y
// itself, from which u + b = (y - t) / g. y belongs to the user: where it was changed in place meanwhile, or g is too
// small to divide by, the product is computed again. Beside a large shift y has lost digits of u, and u is kept
// (`separable`). Of a large y without an activation, where a gate serves the whole batch, nothing at all:
// dg = (<dW, W> + db b) / g (weight_tells). W' is folded again where dx asks for it.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/threshold_backward.h>

#include <array>
#include <mutex>

#include "cpu/kernels.h"
#include "node.h"
#include "products.h"
#include "sample_gates.h"

namespace mrvae {

// Whether somebody packs saved tensors, as torch.utils.checkpoint does.
inline bool hooks_pack() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// What a forward pass leaves: the activation's argument or u, or the result y and its version.
class Kept {
 public:
  bool is_result = false;
  bool separable = false;  // whether y tells u + b where there is a shift

  void argument(const Tensor& u) {
    hooked_ = hooks_pack();
    hooked_ ? void(packed_ = SavedVariable(u, false)) : void(tensor_ = u);
  }
  void result(const Tensor& y) {
    auto* impl = y.unsafeGetTensorImpl();
    // y without its history, which would hold itself; its version counter stays shared
    tensor_ = Tensor(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/false));
    is_result = true;
    version_ = y._version();
  }
  // Undefined where nothing was kept, or where the user has changed y in place since.
  Tensor get() const {
    if (hooked_) return packed_.unpack();
    return tensor_.defined() && is_result && tensor_._version() != version_ ? Tensor() : tensor_;
  }
  void release() {
    tensor_.reset();
    packed_.reset_data();
  }

 private:
  Tensor tensor_;
  SavedVariable packed_;
  bool hooked_ = false;
  std::uint32_t version_ = 0;
};

// Whether y of an epilogue tells u + b: on the CPU, where the gates can be looked at, and not in float16, where g u soon
// is too small a number, nor beside a shift in bfloat16. Under hooks y would be packed, of which no version is known.
inline bool result_tells(const Tensor& y, bool shifted, Activation activation) {
  const auto dtype = y.scalar_type();
  return !on_gpu(y) && dtype != at::kHalf && !(shifted && dtype == at::kBFloat16) && !hooks_pack() &&
         (activation == Activation::None || activation == Activation::Relu);
}

// Whether u + b = y / g for every one of the gates. A gate of exactly 0: after a ReLU nothing gets a gradient there; else
// only if the gate is known to have none itself (`inert`).
template <class T>
bool divisible(const Tensor& gate, Activation activation, bool inert) {
  const bool relu = activation == Activation::Relu;
  return cpu::divisible(gate.const_data_ptr<T>(), gate.numel(), /*positive=*/relu, /*zeros=*/relu || inert);
}

// Whether dW tells what is asked of u + b: of one gate a channel, float32 and float64 on the CPU. It takes a pass over W
// and dW, so a y of less than an eighth of W, or of a few pages, is kept all the same.
inline bool weight_tells(const Tensor& y, const Tensor& weight, const Tensor& gate, const OptionalTensor& bias,
                         const OptionalTensor& shift, Activation activation) {
  const auto dtype = weight.scalar_type();
  const bool exact = (dtype == at::kFloat || dtype == at::kDouble) && gate.scalar_type() == dtype &&
                     (!given(bias) || bias->scalar_type() == dtype);
  return exact && activation == Activation::None && !given(shift) && result_tells(y, false, activation) &&
         gate.dim() == 1 && weight.requires_grad() && y.numel() >= std::max<std::int64_t>(4096, weight.numel() / 8);
}

// values / gate, and 0 where the gate is 0
template <class T>
void divide(const Tensor& values, const Tensor& gate) {
  T* value = values.mutable_data_ptr<T>();
  const T* g = gate.const_data_ptr<T>();
  for (std::int64_t c = 0; c < gate.numel(); ++c) value[c] = g[c] == T(0) ? T(0) : value[c] / g[c];
}

template <class Product>
std::int64_t channel_axis(const Tensor& y) {
  return Product::channel_axis < 0 ? y.dim() - 1 : Product::channel_axis;
}

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

// y; `kept` where a backward pass will need something.
template <class Product>
Tensor compute(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const Tensor& gate, const OptionalTensor& shift, Activation activation, Strategy strategy,
               Kept* kept = nullptr, const SampleGates& made = {}) {
  if (strategy == Strategy::Fused) {
    return fused_forward(product.fused(), x, weight, bias, gate, shift, activation, /*keep=*/false).y;
  }
  check(product, x, weight, made ? made.source->eta : gate, strategy);
  if (strategy == Strategy::Epilogue) {
    const Tensor u = product.forward(x, weight, Tensor());
    const bool shifted = given(shift) || made.shift >= 0;
    const bool tells = result_tells(u, shifted, activation) && (!shifted || (kept != nullptr && kept->separable));
    const bool u_is_free = kept == nullptr || tells;
    const Tensor y = made ? sample_epilogue(u, bias, made, activation, u_is_free)
                          : call_epilogue(u, bias, gate, shift, channel_axis<Product>(u), activation_name(activation),
                                          u_is_free);
    if (kept != nullptr) tells ? kept->result(y) : kept->argument(u);
    return y;
  }
  const auto [folded, folded_bias] =
      fold_layer({weight, bias.value_or(Tensor()), gate, shift.value_or(Tensor()), product.fold_groups});
  const Tensor z = product.forward(x, folded, folded_bias), y = activate_(z, activation);
  // under hooks nothing: z is computed again
  if (kept != nullptr && saves_argument(activation)) kept->argument(z);
  if (kept != nullptr && !saves_argument(activation) && !hooks_pack()) kept->result(y);
  return y;
}

// A gate or a shift: its values, and where their gradient goes.
struct GateInput {
  Tensor values;
  Edge edge;
  bool inert = false;  // of a gate: at the value 0 it gets no gradient
  bool bounded = false;  // of a gate: slope_within_value()
  SampleGates made{};  // in place of the values: the node makes them, and `edge` takes their sums
};

// Whether y tells u + b beside a shift, by the values of both. Not of one beta: a network's first such step has no plan and
// goes by the operators, and would have other bits than the rest.
inline bool separable(const GateInput& gate, const GateInput& shift) {
  if (!gate.bounded) return false;
  if (gate.made) return gate.made.shift >= 0 && gate.made.divide();
  if (!shift.values.defined() || gate.values.dim() != 2 || on_gpu(gate.values)) return false;
  const auto dtype = gate.values.scalar_type();
  if (dtype != shift.values.scalar_type() || (dtype != at::kFloat && dtype != at::kDouble)) return false;
  const Tensor g = gate.values.contiguous(), t = shift.values.contiguous();
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    return cpu::separable(g.const_data_ptr<T>(), t.const_data_ptr<T>(), g.numel());
  };
  return dtype == at::kDouble ? of(0.0) : of(0.0f);
}

template <class Product>
struct ProductNode final : Node {
  // y = product with its epilogue, recorded. The tensors are ordinary ones (eager()).
  static Tensor record(const Product& product, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const GateInput& gate, const GateInput& shift, Activation activation, Strategy strategy) {
    refuse_tangents(Product::name, {&x, &weight, pointer(bias), &gate.values, &shift.values});
    const auto node = make_node<ProductNode>();
    node->set_next_edges({gradient_edge(x), gradient_edge(weight), given(bias) ? gradient_edge(*bias) : Edge(), gate.edge,
                          shift.edge});
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const bool active = activation != Activation::None;
      const bool keeps = active || (strategy == Strategy::Epilogue && gate.edge.is_valid());
      if (keeps && strategy == Strategy::Epilogue) node->kept_.separable = separable(gate, shift);
      y = compute(product, x, weight, bias, gate.values, optional(shift.values), activation, strategy,
                  keeps ? &node->kept_ : nullptr, gate.made);
    }
    if (strategy == Strategy::Epilogue && gate.edge.is_valid() && !gate.made &&
        weight_tells(y, weight, gate.values, bias, optional(shift.values), activation)) {
      node->kept_.release();
      node->weight_tells_ = true;
    }
    node->product_ = product;
    node->activation_ = activation;
    node->strategy_ = strategy;
    node->inert_ = gate.inert;
    node->made_ = gate.made;
    const Tensor* tensors[] = {&x, &weight, pointer(bias), &gate.values, &shift.values};
    const auto read = reads(*node, activation);
    for (std::size_t i = 0; i < count; ++i) {
      if (read[i] && tensors[i] != nullptr && tensors[i]->defined()) node->inputs_[i] = SavedVariable(*tensors[i], false);
    }
    torch::autograd::set_history(y, node);
    return y;
  }

  std::string name() const override { return std::string(Product::name) + "_backward"; }

  // Called before apply(), where nothing will come back to this node: the engine releases after it, which would keep y
  // through the product's backward pass.
  void will_release_variables() override { last_ = true; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (released_) return;
    for (SavedVariable& input : inputs_) input.reset_data();
    kept_.release();
    made_.source.reset();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, Product::name, ": trying to backward through the graph a second time, after its buffers were "
                "freed; pass retain_graph=True to the first backward()");
    Wanted wanted;
    for (std::size_t i = 0; i < count; ++i) wanted[i] = task_should_compute_output(i);
    variable_list gradients(count);
    if (!grads[0].defined()) return gradients;
    refuse_tangents(Product::name, {&grads[0]});
    if (!eager({&grads[0]})) grads[0] = incoming(Product::name, grads[0]);
    variable_list inputs(count);
    for (std::size_t i = 0; i < count; ++i) inputs[i] = inputs_[i].unpack();
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      gradients = strategy_ == Strategy::Fold ? through_fold(grads[0], inputs, wanted)
                                              : through_epilogue(grads[0], inputs, wanted);
    }
    return once_differentiable(Product::name, std::move(gradients));
  }

 private:
  enum Input : std::size_t { X, Weight, Bias, Gate, Shift, count };
  using Wanted = std::array<bool, count>;

  // Which inputs the backward pass reads: what is frozen is not kept, and may change meanwhile. Where there is an
  // activation, whose argument may be computed again, or a gradient of the gate, all of them.
  static Wanted reads(const ProductNode& node, Activation activation) {
    const auto asked = [&](std::size_t i) { return node.next_edge(i).is_valid(); };
    const bool all = activation != Activation::None || asked(Gate) || !Product::reads_one_side;
    const bool folds = node.strategy_ == Strategy::Fold;  // the weight's shape is that of what is folded
    return {all || asked(Weight), all || folds || asked(X) || asked(Weight), all || asked(Bias) || asked(Shift), true, true};
  }

  variable_list through_epilogue(Tensor& grad, const variable_list& in, const Wanted& wanted) {
    EpilogueBackward how;
    if (made_) made_.source->check_unchanged();
    const bool of_weight = weight_tells_ && wanted[Gate] && direct({&grad, &in[Weight], &in[Gate], &in[Bias]}) &&
                           divides(in[Gate]);
    how.overwrite = direct({&grad}) && ours(grad);  // asked before u holds it too
    // without a gate's gradient and an activation u has no influence, and may not have been kept
    Tensor u = grad;
    if ((wanted[Gate] && !of_weight) || activation_ != Activation::None) {
      u = kept_.get();
      how.of_result =
          kept_.is_result && u.defined() && direct({&grad, &in[Gate], &in[Bias], &in[Shift]}) && divides(in[Gate]);
      if (!u.defined() || (kept_.is_result && !how.of_result)) u = product_.forward(in[X], in[Weight], Tensor());
    }
    const bool of_u = wanted[X] || wanted[Weight] || of_weight;
    auto [grad_u, grad_bias, grad_gate, grad_shift] =
        made_ ? sample_epilogue_backward(grad, u, optional(in[Bias]), made_, activation_,
                                         {of_u, wanted[Bias], wanted[Gate], wanted[Shift]}, how)
              : call_epilogue_backward(grad, u, optional(in[Bias]), in[Gate], optional(in[Shift]), channel_axis<Product>(u),
                                       activation_name(activation_),
                                       {of_u, wanted[Bias] || (of_weight && in[Bias].defined()),
                                        wanted[Gate] && !of_weight, wanted[Shift]}, how);
    u.reset();
    grad.reset();
    if (last_) kept_.release();
    ProductGrads through;
    if (of_u) through = product_.backward(grad_u, in[X], in[Weight], {wanted[X], wanted[Weight] || of_weight, false});
    if (of_weight) {
      const Layer layer{in[Weight], in[Bias], in[Gate], Tensor(), product_.fold_groups};
      grad_gate = fold_layer_backward(layer, {through.weight, grad_bias, false, false, true, false, false}).gate;
      const Tensor gate = in[Gate].contiguous();
      gate.scalar_type() == at::kDouble ? divide<double>(grad_gate, gate) : divide<float>(grad_gate, gate);
    }
    return {through.x, wanted[Weight] ? through.weight : Tensor(), wanted[Bias] ? grad_bias : Tensor(), grad_gate,
            grad_shift};
  }

  bool divides(const Tensor& gate) const {
    if (kept_.separable) return true;
    if (made_) return made_.divide();
    const Tensor values = gate.contiguous();
    if (values.scalar_type() == at::kDouble) return divisible<double>(values, activation_, inert_);
    return values.scalar_type() == at::kFloat && divisible<float>(values, activation_, inert_);
  }

  variable_list through_fold(Tensor& grad, const variable_list& in, const Wanted& wanted) {
    const Layer layer{in[Weight], in[Bias], in[Gate], in[Shift], product_.fold_groups};
    const bool weight = wanted[Weight] || wanted[Gate];
    const bool bias = wanted[Bias] || wanted[Shift] || (wanted[Gate] && in[Bias].defined());
    Tensor saved = kept_.get();
    const bool again = activation_ != Activation::None && !saved.defined();
    // the weight's values matter to dx alone
    LayerFolded folded{in[Weight], Tensor()};
    if (wanted[X] || again) folded = fold_layer(layer);
    if (again) {
      const Tensor z = product_.forward(in[X], folded.weight, folded.bias);
      saved = saves_argument(activation_) ? z : activate(z, activation_);
    }
    const Tensor grad_z = activation_ == Activation::Relu && direct({&grad}) && ours(grad) && same_layout(grad, saved)
                              ? at::threshold_backward_out(grad, grad, saved, 0)
                              : activation_gradient(grad, saved, activation_);
    saved.reset();
    grad.reset();
    if (last_) kept_.release();
    const ProductGrads through = product_.backward(grad_z, in[X], folded.weight, {wanted[X], weight, bias});
    if (!weight && !bias) return {through.x, Tensor(), Tensor(), Tensor(), Tensor()};
    const auto [grad_weight, grad_bias, grad_gate, grad_shift] = fold_layer_backward(
        layer,
        {through.weight, through.bias, wanted[Weight], wanted[Bias], wanted[Gate], wanted[Shift], /*overwrite=*/true});
    return {through.x, grad_weight, grad_bias, grad_gate, grad_shift};
  }

  std::array<SavedVariable, count> inputs_;
  Product product_{};
  Activation activation_ = Activation::None;
  Strategy strategy_ = Strategy::Epilogue;
  bool inert_ = false, weight_tells_ = false, last_ = false, released_ = false;
  Kept kept_;
  SampleGates made_;
};

}  // namespace mrvae
