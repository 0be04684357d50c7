#include <ATen/ops/empty.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "cpu/kernels.h"
#if defined(MRVAE_CUDA)
#include "cuda/kernels.h"
#endif
#include "ops.h"

namespace mrvae {

void check_gates(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes, IntArrayRef kinds) {
  check_floating("gates", "weight", weight);
  check_floating("gates", "bias", bias);
  check_floating("gates", "eta", eta);
  check_device("gates", "bias", bias, weight);
  check_device("gates", "eta", eta, weight);
  std::int64_t total = 0;
  for (const std::int64_t size : sizes) {
    TORCH_CHECK_VALUE(size >= 0, "gates: sizes has ", size, "; expected no negative number");
    total += size;
  }
  TORCH_CHECK_VALUE(
      bias.dim() == 1 && bias.size(0) == total &&
          (weight.dim() == 1 ? weight.size(0) == total
                             : weight.dim() == 2 && weight.size(0) >= 1 && weight.size(0) <= gate_degrees &&
                                   weight.size(1) == total),
      "gates: weight and bias have shapes ", weight.sizes(), " and ", bias.sizes(), "; expected (", total,
      ",) each, the sum of sizes, or (degree, ", total, ") for the weight of gates of degree 1, 2 or 3");
  TORCH_CHECK_VALUE(eta.dim() <= 1, "gates: eta has shape ", eta.sizes(),
                    "; expected one number (0-d), or one a sample (N,)");
  TORCH_CHECK_VALUE(kinds.size() == sizes.size(), "gates: got ", kinds.size(), " kinds for ", sizes.size(),
                    " sizes; expected one kind a size");
  for (const std::int64_t kind : kinds) {
    TORCH_CHECK_VALUE(kind >= 0 && kind < gate_kinds, "gates: kind is ", kind,
                      "; expected 0 (sigmoid), 1 (sqrt), 2 (softplus) or 3 (identity)");
  }
}

namespace {

template <class T>
std::vector<GateSlice<T>> slices(const std::vector<Tensor>& values, IntArrayRef sizes, IntArrayRef kinds) {
  std::vector<GateSlice<T>> result;
  result.reserve(sizes.size());
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    T* data = values[i].defined() ? static_cast<T*>(values[i].data_ptr()) : nullptr;
    result.push_back({offset, sizes[i], Gate(kinds[i]), data});
    offset += sizes[i];
  }
  return result;
}

// weight, bias and eta, contiguous and of the dtype of gates, and the slices' values or their gradients
struct Operands {
  Tensor weight, bias, eta;
  std::vector<Tensor> values;
  IntArrayRef sizes, kinds;
};

template <class T>
void forward(const Operands& operands) {
  const auto parts = slices<T>(operands.values, operands.sizes, operands.kinds);
  const auto parameters = gate_parameters<T>(operands.weight, operands.bias);
  const T* eta = data<T>(operands.eta);
#if defined(MRVAE_CUDA)
  if (on_gpu(operands.weight)) {
    const Launch launch(operands.weight);
    return cuda::gates_forward<T>(parts, parameters, eta, operands.eta.numel(), launch.stream());
  }
#endif
  cpu::gates_forward<T>(parts, parameters, eta, operands.eta.numel());
}

// grad_eta may be undefined: then it is not computed
template <class T>
void backward(const Operands& operands, const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& grad_eta) {
  const auto parts = slices<T>(operands.values, operands.sizes, operands.kinds);
  const auto parameters = gate_parameters<T>(operands.weight, operands.bias);
  const auto grads = gate_gradients<T>(grad_weight, grad_bias);
  const T* eta = data<T>(operands.eta);
  T* deta = mutable_data<T>(grad_eta);
  const std::int64_t samples = operands.eta.numel();
#if defined(MRVAE_CUDA)
  if (on_gpu(operands.weight)) {
    const Launch launch(operands.weight);
    const std::int64_t bytes = cuda::gates_backward_scratch(parts, samples, parameters.degree, deta != nullptr);
    const Tensor sums = scratch(bytes, operands.weight);
    return cuda::gates_backward<T>(parts, parameters, eta, samples, grads, deta, sums.data_ptr(), launch.stream());
  }
#endif
  cpu::gates_backward<T>(parts, parameters, eta, samples, grads, deta);
}

// `sizes` of the contiguous memory of `all`, from element `offset` on, without the dispatcher's 0.5 us for a view.
Tensor piece(const Tensor& all, std::int64_t offset, IntArrayRef sizes) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(all.storage()), all.key_set(),
                                                   all.dtype());
  impl->set_storage_offset(offset);
  impl->set_sizes_contiguous(sizes);
  return Tensor(std::move(impl));
}

// Memory for the slices' values: their own, or parts of one block, which on the CPU is one allocation for all gates.
std::vector<Tensor> allocate(const Operands& operands, bool together) {
  const std::int64_t samples = operands.eta.numel(), dims = operands.eta.dim() == 0 ? 1 : 0;
  constexpr std::int64_t line = 16;  // numbers; a slice begins where a cache line does
  const auto lines = [&](std::int64_t size) { return (samples * size + line - 1) / line * line; };
  std::vector<Tensor> values;
  values.reserve(operands.sizes.size());
  Tensor all;
  std::int64_t offset = 0;
  if (together) {
    for (const std::int64_t size : operands.sizes) offset += lines(size);
    all = fresh(offset, operands.weight.scalar_type(), operands.weight);
    offset = 0;
  }
  for (const std::int64_t size : operands.sizes) {
    const std::int64_t both[] = {samples, size};
    const auto shape = IntArrayRef(both).slice(dims);
    values.push_back(together ? piece(all, offset, shape) : fresh(shape, operands.weight.scalar_type(), operands.weight));
    offset += lines(size);
  }
  return values;
}

std::vector<Tensor> compute(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                            IntArrayRef kinds, bool together) {
  check_gates(weight, bias, eta, sizes, kinds);
  const auto dtype = gate_dtype(weight.scalar_type());
  Operands operands{operand(weight, dtype), operand(bias, dtype), operand(eta, dtype), {}, sizes, kinds};
  operands.values = allocate(operands, together);
  dtype == at::kDouble ? forward<double>(operands) : forward<float>(operands);
  return std::move(operands.values);
}

struct GatesNode : torch::autograd::Function<GatesNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                               IntArrayRef sizes, IntArrayRef kinds) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({weight, bias, eta});
    ctx->saved_data["sizes"] = sizes;
    ctx->saved_data["kinds"] = kinds;
    ctx->set_materialize_grads(false);
    if (direct({&weight, &bias, &eta})) return gates(weight, bias, eta, sizes, kinds);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::gates", "").typed<decltype(gates)>();
    return op.call(weight, bias, eta, sizes, kinds);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_tangents("gates", grads);
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toIntVector(), kinds = ctx->saved_data["kinds"].toIntVector();
    const bool eta_needs_grad = ctx->needs_input_grad(2);
    bool plain = direct({&saved[0], &saved[1], &saved[2]});
    for (const Tensor& grad : grads) plain = plain && (!grad.defined() || eager({&grad}));
    GateGrads out;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      out = (plain ? gates_gradients : call_gates_backward)(grads, saved[0], saved[1], saved[2], sizes, kinds,
                                                            eta_needs_grad);
    }
    auto& [weight, bias, eta] = out;
    return once_differentiable("gates", {weight, bias, eta, Tensor(), Tensor()});
  }
};

}  // namespace

std::vector<Tensor> gates(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                          IntArrayRef kinds) {
  return compute(weight, bias, eta, sizes, kinds, /*together=*/false);
}

std::vector<Tensor> gates_together(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                                   IntArrayRef kinds) {
  return compute(weight, bias, eta, sizes, kinds, /*together=*/weight.device().is_cpu());
}

GateGrads gates_gradients(TensorList grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                          IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad) {
  check_gates(weight, bias, eta, sizes, kinds);
  TORCH_CHECK_VALUE(grads.size() == sizes.size(), "gates_backward: got ", grads.size(), " gradients for ",
                    sizes.size(), " gates");
  const auto dtype = gate_dtype(weight.scalar_type());
  Operands operands{operand(weight, dtype), operand(bias, dtype), operand(eta, dtype), {}, sizes, kinds};
  operands.values.reserve(grads.size());
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    operands.values.push_back(grad.defined() ? operand(grad, dtype) : Tensor());
    TORCH_CHECK_VALUE(!grad.defined() || grad.numel() == eta.numel() * sizes[i], "gates_backward: gradient ", i,
                      " has shape ", grad.sizes(), "; expected that of the gate");
  }
  const Tensor grad_weight = fresh_like(operands.weight), grad_bias = fresh_like(operands.bias);
  const Tensor grad_eta = eta_needs_grad ? fresh_like(operands.eta) : Tensor();
  dtype == at::kDouble ? backward<double>(operands, grad_weight, grad_bias, grad_eta)
                       : backward<float>(operands, grad_weight, grad_bias, grad_eta);
  const auto as = [](const Tensor& grad, const Tensor& like) {
    return !grad.defined() || grad.scalar_type() == like.scalar_type() ? grad : grad.to(like.scalar_type());
  };
  return {as(grad_weight, weight), as(grad_bias, bias), as(grad_eta, eta)};
}

GateGrads gates_backward(const OptionalTensorList& grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                         IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad) {
  variable_list given_grads;
  given_grads.reserve(grads.size());
  for (std::size_t i = 0; i < grads.size(); ++i) given_grads.push_back(grads.get(i).value_or(Tensor()));
  GateGrads out = gates_gradients(given_grads, weight, bias, eta, sizes, kinds, eta_needs_grad);
  if (!eta_needs_grad) std::get<2>(out) = at::empty({0}, eta.options());
  return out;
}

GateGrads call_gates_backward(TensorList grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                              IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad) {
  OptionalTensorList optional_grads;
  optional_grads.reserve(grads.size());
  for (const Tensor& grad : grads) optional_grads.push_back(optional(grad));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mrvae::gates_backward", "")
                             .typed<decltype(gates_backward)>();
  GateGrads out = op.call(optional_grads, weight, bias, eta, sizes, kinds, eta_needs_grad);
  if (!eta_needs_grad) std::get<2>(out) = Tensor();
  return out;
}

std::vector<Tensor> gates_autograd(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                                   IntArrayRef kinds) {
  if (recording({&weight, &bias, &eta})) return GatesNode::apply(weight, bias, eta, sizes, kinds);
  at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::gates", "").typed<decltype(gates)>();
  return op.call(weight, bias, eta, sizes, kinds);
}

}  // namespace mrvae
