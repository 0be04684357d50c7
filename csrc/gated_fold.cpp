// All gates of a model and the layers that it folds, as one autograd node: what a training step begins with.
//
//   g_i = act_i(w_i eta + c_i);  W' = g W, b' = g b + t for the folded layers
//   backward: dW, db, dg, dt of the folded layers, then dw, dc of all gates
#include "gated_fold.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>

namespace mrvae {
namespace {

using Plan = c10::intrusive_ptr<torch::CustomClassHolder>;

struct GatedFoldNode : torch::autograd::Function<GatedFoldNode> {
  // inputs: the gates' weight and bias, eta, the layers' weights, then their biases that exist, at bias_at
  static variable_list forward(AutogradContext* ctx, TensorList inputs, const Plan& held, IntArrayRef bias_at) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto& plan = static_cast<const GatedFold&>(*held);
    variable_list outputs = gates(inputs[0], inputs[1], inputs[2], plan.sizes, plan.kinds);
    variable_list saved = inputs.vec();
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    auto [weights, biases] = as_lists(fold_layers(layers(saved, plan, bias_at)));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["bias_at"] = bias_at;
    ctx->saved_data["plan"] = c10::IValue::make_capsule(held);
    ctx->set_materialize_grads(false);
    variable_list empty;
    outputs.insert(outputs.end(), weights.begin(), weights.end());
    for (std::size_t i = 0; i < biases.size(); ++i) {
      if (bias_at[i] < 0 && plan.shift_at[i] < 0) empty.push_back(biases[i]);
      outputs.push_back(std::move(biases[i]));
    }
    ctx->mark_non_differentiable(empty);
    return outputs;
  }

  // A reference, not a copy: a copy of the list would hold the buffers a second time.
  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto bias_at = ctx->saved_data["bias_at"].toIntVector();
    const auto capsule = ctx->saved_data["plan"].toCapsule();
    const auto& plan = static_cast<const GatedFold&>(*capsule);
    const std::size_t slices = plan.sizes.size(), count = plan.groups.size();
    const auto wanted = [&](std::int64_t at) { return at >= 0 && ctx->needs_input_grad(std::size_t(at)); };
    const bool gated = wanted(0) || wanted(1) || wanted(2);
    variable_list gradients(saved.size() - slices + 2);  // none for the plan and bias_at
    bool plain = true;
    for (const Tensor& tensor : saved) plain = plain && (!tensor.defined() || direct({&tensor}));
    for (const Tensor& grad : grads) plain = plain && (!grad.defined() || direct({&grad}));
    {
      at::AutoDispatchBelowADInplaceOrView below;
      std::vector<LayerRequest> requests(count);
      for (std::size_t i = 0; i < count; ++i) {
        Tensor& grad = grads[slices + i];
        const bool overwrite = plain && ours(grad) && grad.scalar_type() == saved[3 + i].scalar_type();
        requests[i] = {std::move(grad), grads[slices + count + i],       wanted(std::int64_t(3 + i)), wanted(bias_at[i]),
                       gated,           gated && plan.shift_at[i] >= 0, overwrite};
      }
      const std::vector<Layer> folded = layers(saved, plan, bias_at);
      std::vector<LayerGrads> results = plain ? fold_layers_backward(folded, requests) : dispatched(folded, requests);
      for (std::size_t i = 0; i < count; ++i) {
        gradients[3 + i] = results[i].weight;
        if (bias_at[i] >= 0) gradients[std::size_t(bias_at[i])] = results[i].bias;
        add(grads[std::size_t(plan.gate_at[i])], results[i].gate);
        if (plan.shift_at[i] >= 0) add(grads[std::size_t(plan.shift_at[i])], results[i].shift);
      }
      if (gated) {
        OptionalTensorList of_gates;
        of_gates.reserve(slices);
        for (std::size_t i = 0; i < slices; ++i) of_gates.push_back(optional(grads[i]));
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("mrvae::gates_backward", "")
                                   .typed<decltype(gates_backward)>();
        std::tie(gradients[0], gradients[1], gradients[2]) =
            plain ? gates_backward(of_gates, saved[0], saved[1], saved[2], plan.sizes, plan.kinds, wanted(2))
                  : op.call(of_gates, saved[0], saved[1], saved[2], plan.sizes, plan.kinds, wanted(2));
        if (!wanted(2)) gradients[2] = Tensor();
      }
    }
    return once_differentiable("gated_fold", std::move(gradients));
  }

 private:
  static void add(Tensor& sum, const Tensor& grad) {
    if (grad.defined()) sum = sum.defined() ? at::add(sum, grad) : grad;
  }

  // The operator layer by layer, for gradients that are not ordinary tensors (vmap over a backward pass).
  static std::vector<LayerGrads> dispatched(const std::vector<Layer>& layers, const std::vector<LayerRequest>& requests) {
    std::vector<LayerGrads> results;
    for (std::size_t i = 0; i < layers.size(); ++i) results.push_back(fold_layer_backward(layers[i], requests[i]));
    return results;
  }

  // saved: the node's inputs, then all gates
  static std::vector<Layer> layers(const variable_list& saved, const GatedFold& plan, IntArrayRef bias_at) {
    const std::size_t first = saved.size() - plan.sizes.size();
    const auto gate = [&](std::int64_t at) { return at < 0 ? Tensor() : saved[first + std::size_t(at)]; };
    std::vector<Layer> result(plan.groups.size());
    for (std::size_t i = 0; i < result.size(); ++i) {
      result[i] = {saved[3 + i], bias_at[i] < 0 ? Tensor() : saved[std::size_t(bias_at[i])], gate(plan.gate_at[i]),
                   gate(plan.shift_at[i]), plan.groups[i]};
    }
    return result;
  }
};

// In terms of the operators, which do without a gradient, trace and dispatch as they always do.
variable_list by_operators(const GatedFold& plan, TensorList inputs, IntArrayRef bias_at) {
  const std::size_t count = plan.groups.size();
  variable_list outputs = gates_autograd(inputs[0], inputs[1], inputs[2], plan.sizes, plan.kinds), chosen;
  if (count == 0) return outputs;  // without a tensor the dispatcher knows no device
  OptionalTensorList biases, shifts;
  for (std::size_t i = 0; i < count; ++i) {
    chosen.push_back(outputs[std::size_t(plan.gate_at[i])]);
    biases.push_back(bias_at[i] < 0 ? OptionalTensor() : OptionalTensor(inputs[std::size_t(bias_at[i])]));
    shifts.push_back(plan.shift_at[i] < 0 ? OptionalTensor() : OptionalTensor(outputs[std::size_t(plan.shift_at[i])]));
  }
  const auto [weights, folded_biases] = fold_autograd(inputs.slice(3, count), biases, chosen, shifts, plan.groups);
  outputs.insert(outputs.end(), weights.begin(), weights.end());
  outputs.insert(outputs.end(), folded_biases.begin(), folded_biases.end());
  return outputs;
}

}  // namespace

GatedFold::GatedFold(Numbers sizes_, Numbers kinds_, Numbers gate_at_, Numbers shift_at_, Numbers groups_)
    : sizes(std::move(sizes_)), kinds(std::move(kinds_)), gate_at(std::move(gate_at_)), shift_at(std::move(shift_at_)),
      groups(std::move(groups_)) {
  TORCH_CHECK_VALUE(kinds.size() == sizes.size() && gate_at.size() == groups.size() && shift_at.size() == groups.size(),
                    "gated_fold: got ", sizes.size(), " sizes, ", kinds.size(), " kinds, ", gate_at.size(), " gates, ",
                    shift_at.size(), " shifts and ", groups.size(), " groups; expected as many kinds as sizes and one of "
                    "the others a layer");
  const auto slices = std::int64_t(sizes.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    TORCH_CHECK_VALUE(gate_at[i] >= 0 && gate_at[i] < slices && shift_at[i] >= -1 && shift_at[i] < slices,
                      "gated_fold: layer ", i, " has its gate in slice ", gate_at[i], " and its shift in ", shift_at[i],
                      "; expected slices below ", slices, ", and -1 for no shift");
  }
}

GatedFolded GatedFold::run(const Tensor& weight, const Tensor& bias, const Tensor& eta,
                           const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases) const {
  const std::size_t count = groups.size(), slices = sizes.size();
  TORCH_CHECK_VALUE(weights.size() == count && biases.size() == count, "gated_fold: got ", weights.size(),
                    " weights and ", biases.size(), " biases; expected ", count, " of each, one a layer of the plan");
  variable_list inputs{weight, bias, eta};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  std::vector<std::int64_t> bias_at(count, -1);
  for (std::size_t i = 0; i < count; ++i) {
    if (!given(biases[i])) continue;
    bias_at[i] = std::int64_t(inputs.size());
    inputs.push_back(*biases[i]);
  }
  bool plain = true, recorded = false;
  for (const Tensor& input : inputs) {
    plain = plain && direct({&input});
    recorded = recorded || recording({&input});
  }
  // the plan, which belongs to Python, for as long as the node lives
  const auto self = Plan::reclaim_copy(const_cast<GatedFold*>(this));
  const variable_list outputs = plain && recorded ? GatedFoldNode::apply(TensorList(inputs), self, IntArrayRef(bias_at))
                                                  : by_operators(*this, inputs, bias_at);
  GatedFolded result;
  auto& [values, folded, folded_biases] = result;
  values.assign(outputs.begin(), outputs.begin() + std::ptrdiff_t(slices));
  folded.assign(outputs.begin() + std::ptrdiff_t(slices), outputs.begin() + std::ptrdiff_t(slices + count));
  for (std::size_t i = 0; i < count; ++i) {
    folded_biases.push_back(bias_at[i] < 0 && shift_at[i] < 0 ? std::nullopt
                                                              : OptionalTensor(outputs[slices + count + i]));
  }
  return result;
}

}  // namespace mrvae
