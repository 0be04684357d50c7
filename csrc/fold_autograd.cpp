#include "ops.h"

namespace mrvae {
namespace {

struct FoldNode : torch::autograd::Function<FoldNode> {
  // tensors: the weights, the gates, then the biases and shifts that exist; bias_at and shift_at are their places, or -1
  static variable_list forward(AutogradContext* ctx, TensorList tensors, IntArrayRef groups, IntArrayRef bias_at,
                               IntArrayRef shift_at) {
    at::AutoDispatchBelowADInplaceOrView below;
    const std::size_t count = groups.size();
    ctx->save_for_backward(tensors.vec());
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["bias_at"] = bias_at;
    ctx->saved_data["shift_at"] = shift_at;
    ctx->set_materialize_grads(false);
    bool plain = true;
    for (const Tensor& tensor : tensors) plain = plain && mrvae::direct({&tensor});
    auto [folded, biases] = plain ? direct_forward(tensors, groups, bias_at, shift_at)
                                  : dispatched_forward(tensors, groups, bias_at, shift_at);
    variable_list outputs = std::move(folded), empty;
    for (std::size_t i = 0; i < count; ++i) {
      if (bias_at[i] < 0 && shift_at[i] < 0) empty.push_back(biases[i]);
      outputs.push_back(std::move(biases[i]));
    }
    ctx->mark_non_differentiable(empty);
    return outputs;
  }

  // A reference, not a copy: a copy of the list would hold the buffers a second time.
  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    refuse_tangents("fold", grads);
    const auto saved = ctx->get_saved_variables();
    const auto groups = ctx->saved_data["groups"].toIntVector(), bias_at = ctx->saved_data["bias_at"].toIntVector(),
               shift_at = ctx->saved_data["shift_at"].toIntVector();
    const auto wanted = [&](std::int64_t at) { return at >= 0 && ctx->needs_input_grad(std::size_t(at)); };
    bool plain = true;
    for (const Tensor& tensor : saved) plain = plain && mrvae::direct({&tensor});
    for (const Tensor& grad : grads) plain = plain && (!grad.defined() || mrvae::direct({&grad}));
    variable_list gradients(saved.size());
    {
      at::AutoDispatchBelowADInplaceOrView below;
      plain ? direct(grads, saved, groups, bias_at, shift_at, wanted, gradients)
            : dispatched(grads, saved, groups, bias_at, shift_at, wanted, gradients);
    }
    gradients.resize(saved.size() + 3);
    return once_differentiable("fold", std::move(gradients));
  }

 private:
  using Places = std::vector<std::int64_t>;

  static Folded direct_forward(TensorList tensors, IntArrayRef groups, IntArrayRef bias_at, IntArrayRef shift_at) {
    const std::size_t count = groups.size();
    const auto at = [&](std::int64_t place) { return place < 0 ? Tensor() : tensors[place]; };
    std::vector<Layer> layers(count);
    for (std::size_t i = 0; i < count; ++i) {
      layers[i] = {tensors[i], at(bias_at[i]), tensors[count + i], at(shift_at[i]), groups[i]};
    }
    return as_lists(fold_layers(layers));
  }

  static Folded dispatched_forward(TensorList tensors, IntArrayRef groups, IntArrayRef bias_at, IntArrayRef shift_at) {
    const std::size_t count = groups.size();
    const auto list = [&](IntArrayRef places) {
      OptionalTensorList result;
      for (const std::int64_t at : places) result.push_back(at < 0 ? OptionalTensor() : OptionalTensor(tensors[at]));
      return result;
    };
    return call_fold(tensors.slice(0, count), list(bias_at), tensors.slice(count, count), list(shift_at), groups);
  }

  template <class Wanted>
  static void direct(variable_list& grads, const variable_list& saved, const Places& groups, const Places& bias_at,
                     const Places& shift_at, const Wanted& wanted, variable_list& gradients) {
    const std::size_t count = groups.size();
    const auto saved_at = [&](std::int64_t at) { return at < 0 ? Tensor() : saved[at]; };
    std::vector<Layer> layers(count);
    std::vector<LayerRequest> requests(count);
    for (std::size_t i = 0; i < count; ++i) {
      layers[i] = {saved[i], saved_at(bias_at[i]), saved[count + i], saved_at(shift_at[i]), groups[i]};
      const bool overwrite = ours(grads[i]) && grads[i].scalar_type() == saved[i].scalar_type();
      requests[i] = {std::move(grads[i]),  grads[count + i],    wanted(i), wanted(bias_at[i]),
                     wanted(count + i),    wanted(shift_at[i]), overwrite};
    }
    std::vector<LayerGrads> results = fold_layers_backward(layers, requests);
    for (std::size_t i = 0; i < count; ++i) {
      gradients[i] = results[i].weight;
      gradients[count + i] = results[i].gate;
      if (bias_at[i] >= 0) gradients[bias_at[i]] = results[i].bias;
      if (shift_at[i] >= 0) gradients[shift_at[i]] = results[i].shift;
    }
  }

  template <class Wanted>
  static void dispatched(const variable_list& grads, const variable_list& saved, const Places& groups,
                         const Places& bias_at, const Places& shift_at, const Wanted& wanted,
                         variable_list& gradients) {
    const std::size_t count = groups.size();
    OptionalTensorList grad_weights, grad_biases, biases, shifts;
    c10::List<bool> mask;
    for (std::size_t i = 0; i < count; ++i) {
      grad_weights.push_back(optional(grads[i]));
      grad_biases.push_back(optional(grads[count + i]));
      biases.push_back(bias_at[i] < 0 ? OptionalTensor() : OptionalTensor(saved[bias_at[i]]));
      shifts.push_back(shift_at[i] < 0 ? OptionalTensor() : OptionalTensor(saved[shift_at[i]]));
    }
    for (std::size_t i = 0; i < count; ++i) {
      for (const bool want : {wanted(i), wanted(bias_at[i]), wanted(count + i), wanted(shift_at[i])}) mask.push_back(want);
    }
    const TensorList weights = TensorList(saved).slice(0, count), gates = TensorList(saved).slice(count, count);
    auto [w, b, g, t] = call_fold_backward(grad_weights, grad_biases, weights, biases, gates, shifts, groups, mask);
    for (std::size_t i = 0; i < count; ++i) {
      if (wanted(i)) gradients[i] = w[i];
      if (wanted(count + i)) gradients[count + i] = g[i];
      if (wanted(bias_at[i])) gradients[bias_at[i]] = b[i];
      if (wanted(shift_at[i])) gradients[shift_at[i]] = t[i];
    }
  }
};

}  // namespace

Folded fold_autograd(TensorList weights, const OptionalTensorList& biases, TensorList gates,
                     const OptionalTensorList& shifts, IntArrayRef groups) {
  const std::size_t count = weights.size();
  TORCH_CHECK_VALUE(biases.size() == count && gates.size() == count && shifts.size() == count && groups.size() == count,
                    "fold: got ", count, " weights, ", biases.size(), " biases, ", gates.size(), " gates, ",
                    shifts.size(), " shifts and ", groups.size(), " groups; expected as many of each");
  variable_list tensors = weights.vec();
  tensors.insert(tensors.end(), gates.begin(), gates.end());
  std::vector<std::int64_t> bias_at(count, -1), shift_at(count, -1);
  for (std::size_t i = 0; i < count; ++i) {
    const OptionalTensor bias = biases.get(i), shift = shifts.get(i);
    if (given(bias)) {
      bias_at[i] = std::int64_t(tensors.size());
      tensors.push_back(*bias);
    }
    if (given(shift)) {
      shift_at[i] = std::int64_t(tensors.size());
      tensors.push_back(*shift);
    }
  }
  bool needed = false;
  for (const Tensor& tensor : tensors) needed = needed || recording({&tensor});
  if (!needed) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_fold(weights, biases, gates, shifts, groups);
  }
  variable_list outputs = FoldNode::apply(TensorList(tensors), IntArrayRef(groups), IntArrayRef(bias_at),
                                          IntArrayRef(shift_at));
  return {variable_list(outputs.begin(), outputs.begin() + count), variable_list(outputs.begin() + count, outputs.end())};
}

}  // namespace mrvae
