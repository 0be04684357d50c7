#include <ATen/EmptyTensor.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>

#include "ops.h"

namespace mrvae {
namespace {

constexpr std::string_view activation_names[] = {"none", "relu", "silu", "gelu", "tanh", "leaky_relu", "elu"};

bool ordinary(const Tensor& tensor) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet allowed(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
       DispatchKey::AutogradCUDA, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  return (tensor.key_set().raw_repr() & ~allowed.raw_repr()) == 0;
}

}  // namespace

bool eager(std::initializer_list<const Tensor*> tensors) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  for (const Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && !ordinary(*tensor)) return false;
  }
  return true;
}

Tensor incoming(const char* op, const Tensor& grad) {
  if (ordinary(grad)) return grad;
  const auto keys = grad.key_set();
  const bool batched = keys.has(c10::DispatchKey::FuncTorchBatched) || keys.has(c10::DispatchKey::Batched);
  Tensor plain = grad;
  if (!batched && plain._is_zerotensor()) plain = at::zeros(plain.sizes(), plain.options());
  if (!batched && plain.is_neg()) plain = plain.resolve_neg();
  TORCH_CHECK_NOT_IMPLEMENTED(ordinary(plain), op, ": the gradient of its result is no ordinary tensor, as with "
                              "is_grads_batched=True; call the layer or the model within "
                              "`with mrvae_kernels.override(backend=\"reference\"):`");
  return plain;
}

bool ours(const Tensor& grad) {
  if (!grad.defined() || grad.use_count() != 1 || !grad.has_storage()) return false;
  const std::size_t holders = grad.storage().use_count();
  if (holders != 2 || !grad.is_view()) return holders == 1;
  // the gradient of a reshape is a view, which holds the tensor that it is of
  const auto& base = grad._base();
  return base.use_count() == 1 && base.numel() == grad.numel();
}

bool records() { return c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled(); }

bool recording(std::initializer_list<const Tensor*> tensors) {
  if (!records()) return false;
  for (const Tensor* tensor : tensors) {
    if (tensor == nullptr || !tensor->defined()) continue;
    // a forward-mode tangent goes through the node too, which refuses it instead of dropping it
    if (tensor->requires_grad() || tensor->_fw_grad(0).defined()) return true;
  }
  return false;
}

void refuse_tangents(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor == nullptr || !tensor->defined()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor->_fw_grad(0).defined(), "Trying to use forward AD with ", op,
                                " that does not support it; call the layer or the model within "
                                "`with mrvae_kernels.override(backend=\"reference\"):`");
  }
}

void refuse_tangents(const char* op, TensorList gradients) {
  for (const Tensor& gradient : gradients) refuse_tangents(op, {&gradient});
}

variable_list once_differentiable(const char* op, variable_list gradients) {
  if (!c10::GradMode::is_enabled()) return gradients;
  const std::string message = std::string(op) +
                              " is differentiable once: its gradient has no derivative. For second derivatives call "
                              "the layer or the model within `with mrvae_kernels.override(backend=\"reference\"):`";
  for (Tensor& gradient : gradients) {
    if (!gradient.defined()) continue;
    torch::autograd::DelayedError node(message, 1);  // makes the node that raises; itself it stays out of the graph
    Tensor carrier = gradient.detach();
    carrier.set_requires_grad(true);  // so that the node is attached, and raises when it is reached
    gradient = node.apply({carrier})[0];
  }
  return gradients;
}

at::ScalarType gate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op, ": ",
                   name, " has dtype ", dtype, "; expected float32, float64, bfloat16 or float16");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& reference) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), op, ": ", name, " is on ", tensor.device(),
                    "; expected ", reference.device(), ", where the other tensors are");
}

Tensor operand(const Tensor& tensor, at::ScalarType dtype) {
  Tensor result = tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
  return result.is_contiguous() ? result : result.contiguous();
}

Tensor fresh(IntArrayRef sizes, at::ScalarType dtype, const Tensor& like) {
  if (like.device().is_cpu()) return Tensor(at::detail::empty_cpu(sizes, dtype));
  return at::empty(sizes, like.options().dtype(dtype));
}

Tensor fresh_like(const Tensor& like) {
  return like.is_contiguous() ? fresh(like.sizes(), like.scalar_type(), like) : at::empty_like(like);
}

Tensor scratch(std::int64_t bytes, const Tensor& like) { return at::empty({bytes}, like.options().dtype(at::kByte)); }

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Storage::Double;
    case at::kBFloat16: return Storage::BFloat16;
    case at::kHalf: return Storage::Half;
    default: return Storage::Float;
  }
}

bool memory_order(const Tensor& u, std::int64_t axis, bool per_sample, EpilogueShape& shape) {
  const std::int64_t samples = per_sample ? u.size(0) : 1;
  shape = {samples, 1, u.size(axis), 1};
  if (u.numel() == 0) {
    shape.rows = 0;
    return true;
  }
  const auto sizes = u.sizes(), strides = u.strides();
  c10::SmallVector<std::int64_t, 6> order;
  for (std::int64_t d = 0; d < u.dim(); ++d) {
    if (sizes[d] > 1 || d == axis) order.push_back(d);
  }
  if (!u.is_contiguous()) {
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      // the stride of a size-1 channel axis says nothing: leave it where it is
      return sizes[a] > 1 && sizes[b] > 1 ? strides[a] > strides[b] : false;
    });
  }
  std::int64_t expected = 1;
  for (std::size_t k = order.size(); k-- > 0;) {
    if (sizes[order[k]] > 1 && strides[order[k]] != expected) return false;
    expected *= sizes[order[k]];
  }
  bool before = true;
  for (const std::int64_t d : order) {
    if (d == axis) {
      before = false;
    } else {
      (before ? shape.rows : shape.inner) *= sizes[d];
    }
  }
  if (per_sample && samples > 1) {
    if (order[0] != 0) return false;
    shape.rows /= samples;
  }
  return true;
}

Tensor dense(const Tensor& u, std::int64_t axis, bool per_sample, EpilogueShape& shape) {
  Tensor result = widened(u);
  if (!memory_order(result, axis, per_sample, shape)) {
    result = result.contiguous();
    memory_order(result, axis, per_sample, shape);
  }
  return result;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type()) return false;
  for (std::int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `value`, computed densely, with the dtype and strides that at::empty_like(like) has
Tensor restored(const Tensor& value, const Tensor& like) {
  if (value.scalar_type() == like.scalar_type() && value.strides() == like.strides()) return value;
  Tensor result = at::empty_like(like);
  if (value.scalar_type() == result.scalar_type() && value.strides() == result.strides()) return value;
  return result.copy_(value);
}

Activation parse_activation(std::string_view name) {
  for (int i = 0; i < 7; ++i) {
    if (name == activation_names[i]) return Activation(i);
  }
  TORCH_CHECK_VALUE(false, "activation is '", name, "'; expected none, relu, silu, gelu, tanh, leaky_relu or elu");
}

std::string_view activation_name(Activation activation) { return activation_names[int(activation)]; }

Strategy parse_strategy(std::string_view name) {
  if (name == "fold") return Strategy::Fold;
  if (name == "fused") return Strategy::Fused;
  TORCH_CHECK_VALUE(name == "epilogue", "strategy is '", name, "'; expected fold, epilogue or fused");
  return Strategy::Epilogue;
}

bool saves_argument(Activation activation) { return activation == Activation::Silu || activation == Activation::Gelu; }

Tensor activate(const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::Relu: return at::relu(z);
    case Activation::Silu: return at::silu(z);
    case Activation::Gelu: return at::gelu(z);
    case Activation::Tanh: return at::tanh(z);
    case Activation::LeakyRelu: return at::leaky_relu(z, leaky_relu_slope);
    case Activation::Elu: return at::elu(z);
    default: return z;
  }
}

Tensor activate_(const Tensor& z, Activation activation) {
  Tensor target = z;
  switch (activation) {
    case Activation::Relu: return at::relu_(target);
    case Activation::Tanh: return at::tanh_(target);
    case Activation::LeakyRelu: return at::leaky_relu_(target, leaky_relu_slope);
    case Activation::Elu: return at::elu_(target);
    default: return activate(z, activation);  // silu and gelu: the gradient needs z
  }
}

Tensor activation_gradient(const Tensor& grad, const Tensor& saved, Activation activation) {
  switch (activation) {
    case Activation::Relu: return at::threshold_backward(grad, saved, 0);
    case Activation::Silu: return at::silu_backward(grad, saved);
    case Activation::Gelu: return at::gelu_backward(grad, saved);
    case Activation::Tanh: return at::tanh_backward(grad, saved);
    case Activation::LeakyRelu: return at::leaky_relu_backward(grad, saved, leaky_relu_slope, /*self_is_result=*/true);
    case Activation::Elu: return at::elu_backward(grad, 1, 1, 1, /*is_result=*/true, saved);
    default: return grad;
  }
}

}  // namespace mrvae
