#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "cpu/kernels.h"
#if defined(MRVAE_CUDA)
#include "cuda/kernels.h"
#endif
#include "ops.h"

namespace mrvae {
namespace {

void check(const Layer& layer, std::size_t index) {
  const Tensor &weight = layer.weight, &gate = layer.gate;
  check_floating("fold", "weight", weight);
  check_floating("fold", "gate", gate);
  check_device("fold", "gate", gate, weight);
  const std::int64_t groups = layer.groups;
  TORCH_CHECK_VALUE(groups >= 0 && weight.dim() >= (groups > 0 ? 2 : 1), "fold: layer ", index, " has a weight of shape ",
                    weight.sizes(), " and groups = ", groups, "; expected groups 0 with the channels in axis 0, or groups "
                    ">= 1 with a transposed convolution's weight (C_in, C_out / groups, ...)");
  TORCH_CHECK_VALUE(groups <= 1 || weight.size(0) % groups == 0, "fold: layer ", index, " has a weight of shape ",
                    weight.sizes(), "; expected axis 0 to be a multiple of groups = ", groups);
  const std::int64_t channels = groups == 0 ? weight.size(0) : weight.size(1) * groups;
  const auto fits = [&](const char* name, const Tensor& tensor) {
    if (!tensor.defined()) return;
    check_floating("fold", name, tensor);
    check_device("fold", name, tensor, weight);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == channels, "fold: layer ", index, " has a ", name,
                      " of shape ", tensor.sizes(), "; expected (", channels, ",), its output channels",
                      tensor.dim() == 2 ? ". One beta a sample cannot be folded: use the epilogue" : "");
  };
  fits("gate", gate);
  fits("bias", layer.bias);
  fits("shift", layer.shift);
}

// The weight as one dense block, and its shape for the kernel.
Tensor prepare(const Layer& layer, FoldLayer& target) {
  EpilogueShape shape;
  const bool grouped = layer.groups > 1;
  Tensor weight = widened(layer.weight);
  const std::int64_t axis = layer.groups > 0 ? 1 : 0;
  if (!memory_order(weight, axis, grouped, shape)) {
    weight = weight.contiguous();
    memory_order(weight, axis, grouped, shape);
  }
  target.storage = storage_of(weight);
  target.groups = grouped ? layer.groups : 1;
  target.outer = grouped ? shape.samples * shape.rows / layer.groups : shape.rows;
  target.channels = shape.channels;
  target.inner = shape.inner;
  return weight;
}

const void* pointer_to(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
void* mutable_pointer_to(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

Tensor converted(const Tensor& tensor, at::ScalarType dtype) {
  return !tensor.defined() || tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

Tensor parameter(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() ? operand(tensor, dtype) : Tensor();
}

// dW' in the layout and dtype of the weight; itself where it fits
Tensor incoming(const Tensor& grad, const Tensor& weight) {
  return same_layout(grad, weight) ? grad : at::empty_like(weight).copy_(grad);
}

// The kernel of the layers' device; there is one launch for all of them.
void launch_forward(const std::vector<FoldLayer>& tasks, const std::vector<Layer>& layers) {
#if defined(MRVAE_CUDA)
  if (!layers.empty() && on_gpu(layers[0].weight)) {
    const Launch launch(layers[0].weight);
    return cuda::fold_forward(tasks, launch.stream());
  }
#endif
  cpu::fold_forward(tasks);
}

void launch_backward(const std::vector<FoldLayer>& tasks, const std::vector<Layer>& layers) {
#if defined(MRVAE_CUDA)
  if (!layers.empty() && on_gpu(layers[0].weight)) {
    const Launch launch(layers[0].weight);
    const Tensor sums = scratch(cuda::fold_backward_scratch(tasks), layers[0].weight);
    return cuda::fold_backward(tasks, sums.data_ptr(), launch.stream());
  }
#endif
  cpu::fold_backward(tasks);
}

// The entry of a list, without the negative bit: torch resolves it in tensors and lists of them, not in lists with gaps.
Tensor resolved(const OptionalTensor& entry) { return given(entry) ? entry->resolve_neg() : Tensor(); }

std::vector<Layer> as_layers(TensorList weights, const OptionalTensorList& biases, TensorList gates,
                             const OptionalTensorList& shifts, IntArrayRef groups) {
  const std::size_t count = weights.size();
  TORCH_CHECK_VALUE(biases.size() == count && gates.size() == count && shifts.size() == count && groups.size() == count,
                    "fold: got ", count, " weights, ", biases.size(), " biases, ", gates.size(), " gates, ",
                    shifts.size(), " shifts and ", groups.size(), " groups; expected as many of each");
  std::vector<Layer> layers(count);
  for (std::size_t i = 0; i < count; ++i) {
    layers[i] = {weights[i], resolved(biases.get(i)), gates[i], resolved(shifts.get(i)), groups[i]};
  }
  return layers;
}

}  // namespace

std::vector<LayerFolded> fold_layers(const std::vector<Layer>& layers) {
  std::vector<LayerFolded> results(layers.size());
  std::vector<FoldLayer> tasks(layers.size(), FoldLayer{});
  std::vector<std::array<Tensor, 4>> operands(layers.size());  // keeps what the kernels read alive
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    check(layer, i);
    check_device("fold", "a weight", layer.weight, layers[0].weight);
    auto& [weight, bias, gate, shift] = operands[i];
    FoldLayer& task = tasks[i];
    weight = prepare(layer, task);
    const auto dtype = gate_dtype(weight.scalar_type());
    gate = operand(layer.gate, dtype);
    bias = parameter(layer.bias, dtype);
    shift = parameter(layer.shift, dtype);
    results[i].weight = at::empty_like(weight);
    if (bias.defined() || shift.defined()) results[i].bias = at::empty_like(gate);
    task.weight = weight.const_data_ptr();
    task.gate = gate.const_data_ptr();
    task.bias = pointer_to(bias);
    task.shift = pointer_to(shift);
    task.folded = results[i].weight.mutable_data_ptr();
    task.folded_bias = mutable_pointer_to(results[i].bias);
  }
  launch_forward(tasks, layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    results[i].weight = restored(results[i].weight, layers[i].weight);
    results[i].bias = converted(results[i].bias, layers[i].weight.scalar_type());
  }
  return results;
}

std::vector<LayerGrads> fold_layers_backward(const std::vector<Layer>& layers,
                                             const std::vector<LayerRequest>& requests) {
  std::vector<LayerGrads> results(layers.size());
  std::vector<FoldLayer> tasks(layers.size(), FoldLayer{});
  std::vector<std::array<Tensor, 5>> operands(layers.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const LayerRequest& request = requests[i];
    check(layer, i);
    check_device("fold", "a weight", layer.weight, layers[0].weight);
    auto& [weight, bias, gate, grad, grad_bias] = operands[i];
    FoldLayer& task = tasks[i];
    LayerGrads& result = results[i];
    weight = prepare(layer, task);
    const auto dtype = gate_dtype(weight.scalar_type());
    gate = operand(layer.gate, dtype);
    bias = parameter(layer.bias, dtype);
    grad_bias = parameter(request.grad_bias, dtype);
    if (request.grad_weight.defined() && (request.weight || request.gate)) grad = incoming(request.grad_weight, weight);
    if (request.weight) {
      result.weight = request.overwrite && grad.defined() ? grad : at::empty_like(weight);
      if (result.weight.is_view()) result.weight = result.weight.detach();  // a view made here refuses to be changed
    }
    if (request.gate) result.gate = at::empty_like(gate);
    if (request.bias && bias.defined()) result.bias = at::empty_like(gate);
    // a tensor of its own: db' may also be somebody else's
    if (request.shift && layer.shift.defined()) result.shift = at::empty_like(gate);
    task.weight = weight.const_data_ptr();
    task.gate = gate.const_data_ptr();
    task.bias = pointer_to(bias);
    task.grad = pointer_to(grad);
    task.grad_bias = pointer_to(grad_bias);
    task.grad_weight = mutable_pointer_to(result.weight);
    task.grad_gate = mutable_pointer_to(result.gate);
    task.grad_layer_bias = mutable_pointer_to(result.bias);
    task.grad_shift = mutable_pointer_to(result.shift);
  }
  launch_backward(tasks, layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    LayerGrads& result = results[i];
    if (result.weight.defined()) result.weight = restored(result.weight, layer.weight);
    if (layer.bias.defined()) result.bias = converted(result.bias, layer.bias.scalar_type());
    result.gate = converted(result.gate, layer.gate.scalar_type());
    if (layer.shift.defined()) result.shift = converted(result.shift, layer.shift.scalar_type());
  }
  return results;
}

Folded as_lists(std::vector<LayerFolded> layers) {
  Folded out;
  for (LayerFolded& layer : layers) {
    if (!layer.bias.defined()) layer.bias = at::empty({0}, layer.weight.options());
    std::get<0>(out).push_back(std::move(layer.weight));
    std::get<1>(out).push_back(std::move(layer.bias));
  }
  return out;
}

Folded fold(TensorList weights, const OptionalTensorList& biases, TensorList gates, const OptionalTensorList& shifts,
            IntArrayRef groups) {
  return as_lists(fold_layers(as_layers(weights, biases, gates, shifts, groups)));
}

FoldGrads fold_backward(const OptionalTensorList& grad_weights, const OptionalTensorList& grad_biases,
                        TensorList weights, const OptionalTensorList& biases, TensorList gates,
                        const OptionalTensorList& shifts, IntArrayRef groups, const c10::List<bool>& mask) {
  const std::vector<Layer> layers = as_layers(weights, biases, gates, shifts, groups);
  const std::size_t count = layers.size();
  TORCH_CHECK_VALUE(grad_weights.size() == count && grad_biases.size() == count && mask.size() == 4 * count,
                    "fold_backward: got ", grad_weights.size(), " and ", grad_biases.size(), " gradients and ",
                    mask.size(), " flags for ", count, " layers; expected one, one and four a layer");
  std::vector<LayerRequest> requests(count);
  for (std::size_t i = 0; i < count; ++i) {
    requests[i] = {resolved(grad_weights.get(i)), resolved(grad_biases.get(i)),
                   mask.get(4 * i),     mask.get(4 * i + 1),
                   mask.get(4 * i + 2), mask.get(4 * i + 3),
                   /*overwrite=*/false};
  }
  FoldGrads out;
  auto& [grad_weight, grad_bias, grad_gate, grad_shift] = out;
  for (LayerGrads& result : fold_layers_backward(layers, requests)) {
    grad_weight.push_back(std::move(result.weight));
    grad_bias.push_back(std::move(result.bias));
    grad_gate.push_back(std::move(result.gate));
    grad_shift.push_back(std::move(result.shift));
  }
  return out;
}

LayerFolded fold_layer(const Layer& layer) {
  if (direct({&layer.weight, &layer.bias, &layer.gate, &layer.shift})) {
    return fold_layers({layer})[0];
  }
  const auto [weights, biases] = call_fold(layer.weight, OptionalTensorList({optional(layer.bias)}), layer.gate,
                                           OptionalTensorList({optional(layer.shift)}), layer.groups);
  return {weights[0], layer.bias.defined() || layer.shift.defined() ? biases[0] : Tensor()};
}

LayerGrads fold_layer_backward(const Layer& layer, const LayerRequest& request) {
  const std::initializer_list<const Tensor*> tensors = {&layer.weight, &layer.bias,          &layer.gate,
                                                        &layer.shift,  &request.grad_weight, &request.grad_bias};
  if (direct(tensors)) return fold_layers_backward({layer}, {request})[0];
  const c10::List<bool> mask({request.weight, request.bias, request.gate, request.shift});
  const auto [weight, bias, gate, shift] = call_fold_backward(
      OptionalTensorList({optional(request.grad_weight)}), OptionalTensorList({optional(request.grad_bias)}),
      layer.weight, OptionalTensorList({optional(layer.bias)}), layer.gate,
      OptionalTensorList({optional(layer.shift)}), layer.groups, mask);
  const auto wanted = [](bool want, const std::vector<Tensor>& list) { return want ? list[0] : Tensor(); };
  return {wanted(request.weight, weight), wanted(request.bias, bias), wanted(request.gate, gate),
          wanted(request.shift, shift)};
}

Folded call_fold(TensorList weights, const OptionalTensorList& biases, TensorList gates,
                 const OptionalTensorList& shifts, IntArrayRef groups) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::fold", "").typed<decltype(fold)>();
  return op.call(weights, biases, gates, shifts, groups);
}

FoldGrads call_fold_backward(const OptionalTensorList& grad_weights, const OptionalTensorList& grad_biases,
                             TensorList weights, const OptionalTensorList& biases, TensorList gates,
                             const OptionalTensorList& shifts, IntArrayRef groups, const c10::List<bool>& mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::fold_backward", "").typed<decltype(fold_backward)>();
  return op.call(grad_weights, grad_biases, weights, biases, gates, shifts, groups, mask);
}

}  // namespace mrvae
