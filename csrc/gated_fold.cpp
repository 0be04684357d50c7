// All gates of a model and the layers that it folds, as one autograd node: what a training step begins with.
//
//   g_i = act_i(w_i eta + c_i), or of more degrees;  W' = g W, b' = g b + t for the folded layers
//   backward: dW, db, dg, dt of the folded layers, then the gradients of all gates' weight and bias
#include "gated_fold.h"

#include <ATen/ops/add.h>

namespace mrvae {

using torch::autograd::edge_list;

namespace {

using Plan = c10::intrusive_ptr<const GatedFold>;

struct GatedFoldNode final : Node {
  std::string name() const override { return "gated_fold_backward"; }

  // inputs: the gates' weight and bias, eta, the layers' weights, then their biases that exist, at bias_at
  static void record(const Plan& plan, TensorList inputs, GatedFold::Numbers bias_at, StepGates& step) {
    edge_list edges;
    edges.reserve(inputs.size());
    for (const Tensor& input : inputs) {
      refuse_tangents("gated_fold", {&input});
      edges.push_back(gradient_edge(input));
    }
    const auto node = make_node<GatedFoldNode>();
    node->set_next_edges(std::move(edges));
    std::vector<LayerFolded> folded;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      if (plan->groups.empty()) step.source = GateSource::make(inputs[0], inputs[1], inputs[2]);
      if (step.source) {
        check_gates(inputs[0], inputs[1], inputs[2], plan->sizes, plan->kinds);
        step.made = slices_of(step.source, plan->sizes, plan->kinds);
        step.values.resize(step.made.size());
      } else {
        step.values = gates_together(inputs[0], inputs[1], inputs[2], plan->sizes, plan->kinds);
      }
      folded = fold_layers(layers(*plan, inputs, bias_at, step.values));
    }
    node->inputs_.reserve(inputs.size());
    for (const Tensor& input : inputs) node->inputs_.emplace_back(input, false);
    if (!folded.empty()) node->values_ = step.values;
    node->bias_at_ = std::move(bias_at);
    node->plan_ = plan;
    node->sums_ = step.source != nullptr;
    node->sums_ ? node->expect(step.made) : node->expect(step.values);
    for (const LayerFolded& layer : folded) {
      torch::autograd::set_history(layer.weight, node);
      step.weights.push_back(layer.weight);
    }
    for (const LayerFolded& layer : folded) {
      torch::autograd::set_history(layer.bias, node);  // of an undefined one: the place of a gradient that never comes
      step.biases.push_back(optional(layer.bias));
    }
    step.node = node;
    for (std::size_t i = 0; i < 3; ++i) step.gated = step.gated || node->next_edge(i).is_valid();
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (released_) return;
    for (SavedVariable& input : inputs_) input.reset_data();
    values_.clear();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, "gated_fold: trying to backward through the graph a second time, after its buffers were "
                "freed; pass retain_graph=True to the first backward()");
    refuse_tangents("gated_fold", grads);
    const GatedFold& plan = *plan_;
    const std::size_t slices = plan.sizes.size(), count = plan.groups.size();
    variable_list inputs;
    inputs.reserve(inputs_.size());
    for (const SavedVariable& input : inputs_) inputs.push_back(input.unpack());
    const auto wanted = [&](std::int64_t at) { return at >= 0 && task_should_compute_output(std::size_t(at)); };
    const bool gated = wanted(0) || wanted(1) || wanted(2);
    variable_list gradients(inputs.size());
    bool plain = true;
    for (const Tensor& tensor : inputs) plain = plain && direct({&tensor});
    for (const Tensor& grad : grads) plain = plain && (!grad.defined() || direct({&grad}));
    {
      at::AutoDispatchBelowADInplaceOrView below;
      std::vector<LayerRequest> requests(count);
      for (std::size_t i = 0; i < count; ++i) {
        Tensor& grad = grads[slices + i];
        const bool overwrite = plain && ours(grad) && grad.scalar_type() == inputs[3 + i].scalar_type();
        requests[i] = {std::move(grad), grads[slices + count + i],       wanted(std::int64_t(3 + i)), wanted(bias_at_[i]),
                       gated,           gated && plan.shift_at[i] >= 0, overwrite};
      }
      const std::vector<Layer> folded = layers(plan, inputs, bias_at_, values_);
      std::vector<LayerGrads> results = plain ? fold_layers_backward(folded, requests) : dispatched(folded, requests);
      for (std::size_t i = 0; i < count; ++i) {
        gradients[3 + i] = results[i].weight;
        if (bias_at_[i] >= 0) gradients[std::size_t(bias_at_[i])] = results[i].bias;
        add(grads[std::size_t(plan.gate_at[i])], results[i].gate);
        if (plan.shift_at[i] >= 0) add(grads[std::size_t(plan.shift_at[i])], results[i].shift);
      }
      if (gated) {
        variable_list sums;
        if (sums_) sums.assign(grads.begin() + std::ptrdiff_t(slices), grads.end());
        grads.resize(slices);
        std::tie(gradients[0], gradients[1], gradients[2]) =
            (plain ? gates_gradients : call_gates_backward)(grads, inputs[0], inputs[1], inputs[2], plan.sizes, plan.kinds,
                                                            wanted(2));
        if (sums_) add_sums(plan.sizes, sums, gradients[0], gradients[1]);
      }
    }
    return once_differentiable("gated_fold", std::move(gradients));
  }

 private:
  // gradients of the slices
  void expect(const std::vector<Tensor>& values) {
    for (const Tensor& value : values) add_input_metadata(value);
  }
  // gradients of the slices and, after them, the sums over the samples that are those of the parameters of layers which
  // make their gates themselves
  void expect(const std::vector<SampleGates>& slices) {
    for (const bool sums : {false, true}) {
      for (const SampleGates& slice : slices) {
        const Tensor& eta = slice.source->eta;
        const c10::SymInt shape[] = {sums ? slice.sums() : eta.numel(), slice.size};
        add_input_metadata(eta.options(), shape, /*is_tensor_subclass=*/false, /*is_nested=*/false, eta.scalar_type());
      }
    }
  }

  static void add(Tensor& sum, const Tensor& grad) {
    if (grad.defined()) sum = sum.defined() ? at::add(sum, grad) : grad;
  }

  // The operator layer by layer, for gradients that are not ordinary tensors (vmap over a backward pass).
  static std::vector<LayerGrads> dispatched(const std::vector<Layer>& layers, const std::vector<LayerRequest>& requests) {
    std::vector<LayerGrads> results;
    for (std::size_t i = 0; i < layers.size(); ++i) results.push_back(fold_layer_backward(layers[i], requests[i]));
    return results;
  }

  static std::vector<Layer> layers(const GatedFold& plan, TensorList inputs, IntArrayRef bias_at,
                                   const std::vector<Tensor>& values) {
    const auto gate = [&](std::int64_t at) { return at < 0 ? Tensor() : values[std::size_t(at)]; };
    std::vector<Layer> result(plan.groups.size());
    for (std::size_t i = 0; i < result.size(); ++i) {
      result[i] = {inputs[3 + i], bias_at[i] < 0 ? Tensor() : inputs[std::size_t(bias_at[i])], gate(plan.gate_at[i]),
                   gate(plan.shift_at[i]), plan.groups[i]};
    }
    return result;
  }

  std::vector<SavedVariable> inputs_;
  std::vector<Tensor> values_;
  GatedFold::Numbers bias_at_;
  Plan plan_;
  bool sums_ = false, released_ = false;
};

// In terms of the operators, which do without a gradient, trace and dispatch as they always do.
void by_operators(const GatedFold& plan, TensorList inputs, IntArrayRef bias_at, StepGates& step) {
  const std::size_t count = plan.groups.size();
  variable_list chosen;
  step.values = gates_autograd(inputs[0], inputs[1], inputs[2], plan.sizes, plan.kinds);
  if (count == 0) return;  // without a tensor the dispatcher knows no device
  OptionalTensorList biases, shifts;
  for (std::size_t i = 0; i < count; ++i) {
    chosen.push_back(step.values[std::size_t(plan.gate_at[i])]);
    biases.push_back(bias_at[i] < 0 ? OptionalTensor() : OptionalTensor(inputs[std::size_t(bias_at[i])]));
    shifts.push_back(plan.shift_at[i] < 0 ? OptionalTensor() : OptionalTensor(step.values[std::size_t(plan.shift_at[i])]));
  }
  auto [weights, folded_biases] = fold_autograd(inputs.slice(3, count), biases, chosen, shifts, plan.groups);
  step.weights = std::move(weights);
  for (std::size_t i = 0; i < count; ++i) {
    step.biases.push_back(bias_at[i] < 0 && plan.shift_at[i] < 0 ? std::nullopt : OptionalTensor(folded_biases[i]));
  }
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

const Tensor& StepGates::value(std::size_t slice) const {
  Tensor& value = values.at(slice);
  if (!value.defined()) {
    const c10::InferenceMode not_in_it(false);
    const at::AutoDispatchBelowADInplaceOrView below;
    value = made[slice].values();
  }
  return value;
}

Tensor StepGates::variable(std::int64_t slice) const {
  const Tensor& value = this->value(std::size_t(slice));
  if (!node) return value;
  const Tensor result = value.variable_data();
  torch::autograd::impl::set_gradient_edge(result, edge(std::size_t(slice)));
  return result;
}

c10::intrusive_ptr<StepGates> GatedFold::run(const Tensor& weight, const Tensor& bias, const Tensor& eta,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<OptionalTensor>& biases) const {
  const std::size_t count = groups.size();
  TORCH_CHECK_VALUE(weights.size() == count && biases.size() == count, "gated_fold: got ", weights.size(),
                    " weights and ", biases.size(), " biases; expected ", count, " of each, one a layer of the plan");
  variable_list inputs{weight, bias, eta};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  Numbers bias_at(count, -1);
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
  auto step = c10::make_intrusive<StepGates>();
  step->plan = Plan::reclaim_copy(this);  // which belongs to Python
  plain && recorded ? GatedFoldNode::record(step->plan, inputs, std::move(bias_at), *step)
                    : by_operators(*this, inputs, bias_at, *step);
  return step;
}

}  // namespace mrvae
