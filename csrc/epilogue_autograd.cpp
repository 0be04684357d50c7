#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>

#include "cpu/kernels.h"
#if defined(MRVAE_CUDA)
#include "cuda/kernels.h"
#endif
#include "ops.h"

namespace mrvae {
namespace {

void check(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
           std::int64_t dim) {
  check_floating("epilogue", "u", u);
  check_floating("epilogue", "gate", gate);
  check_device("epilogue", "gate", gate, u);
  TORCH_CHECK_VALUE(u.dim() > 0 && dim >= -u.dim() && dim < u.dim(), "epilogue: dim is ", dim, " for u of shape ",
                    u.sizes(), "; expected an axis of u");
  const std::int64_t axis = dim < 0 ? dim + u.dim() : dim, channels = u.size(axis);
  const bool shared = gate.dim() == 1 && gate.size(0) == channels;
  const bool per_sample = gate.dim() == 2 && axis > 0 && gate.size(0) == u.size(0) && gate.size(1) == channels;
  TORCH_CHECK_VALUE(shared || per_sample, "epilogue: gate has shape ", gate.sizes(), " for u of shape ", u.sizes(),
                    "; expected (C,) with C = ", channels, ", or (N, C) with one row a sample and the channels not in axis 0");
  if (given(bias)) {
    check_floating("epilogue", "bias", *bias);
    check_device("epilogue", "bias", *bias, u);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == channels, "epilogue: bias has shape ", bias->sizes(),
                      "; expected (", channels, ",)");
  }
  if (given(shift)) {
    check_floating("epilogue", "shift", *shift);
    check_device("epilogue", "shift", *shift, u);
    TORCH_CHECK_VALUE(shift->sizes() == gate.sizes(), "epilogue: shift has shape ", shift->sizes(), "; expected ",
                      gate.sizes(), ", that of gate");
  }
}

struct Parameters {
  Tensor gate, bias, shift;
  Activation activation;
  bool of_result = false;
  Parameters(const OptionalTensor& b, const Tensor& g, const OptionalTensor& t, std::string_view name,
             at::ScalarType dtype)
      : gate(operand(g, dtype)), activation(parse_activation(name)) {
    if (given(b)) bias = operand(*b, dtype);
    if (given(t)) shift = operand(*t, dtype);
  }
  template <class T>
  EpilogueParameters<T> pointers() const {
    return {data<T>(gate), data<T>(bias), data<T>(shift), activation, of_result};
  }
};

// The kernel of u's device.
template <class T>
void launch_forward(const Tensor& u, const EpilogueShape& shape, const Parameters& with, const Tensor& y) {
#if defined(MRVAE_CUDA)
  if (on_gpu(u)) {
    const Launch launch(u);
    return cuda::epilogue_forward(storage_of(u), shape, u.const_data_ptr(), with.pointers<T>(), y.mutable_data_ptr(),
                                  launch.stream());
  }
#endif
  cpu::epilogue_forward(storage_of(u), shape, u.const_data_ptr(), with.pointers<T>(), y.mutable_data_ptr());
}

template <class T>
void launch_backward(const Tensor& grad, const Tensor& u, const EpilogueShape& shape, const Parameters& with,
                     const EpilogueGrads& grads) {
  const auto& [grad_u, grad_bias, grad_gate, grad_shift] = grads;
  const EpilogueGradients<T> out{grad_u.defined() ? grad_u.mutable_data_ptr() : nullptr, mutable_data<T>(grad_gate),
                                 mutable_data<T>(grad_shift), mutable_data<T>(grad_bias)};
#if defined(MRVAE_CUDA)
  if (on_gpu(u)) {
    const Launch launch(u);
    const Tensor sums = scratch(cuda::epilogue_backward_scratch(storage_of(u), shape, grad_gate.defined()), u);
    return cuda::epilogue_backward(storage_of(u), shape, grad.const_data_ptr(), u.const_data_ptr(), with.pointers<T>(),
                                   out, sums.data_ptr(), launch.stream());
  }
#endif
  cpu::epilogue_backward(storage_of(u), shape, grad.const_data_ptr(), u.const_data_ptr(), with.pointers<T>(), out);
}

struct EpilogueNode : torch::autograd::Function<EpilogueNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& u, const OptionalTensor& bias, const Tensor& gate,
                        const OptionalTensor& shift, std::int64_t dim, std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({u, bias.value_or(Tensor()), gate, shift.value_or(Tensor())});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["activation"] = std::string(activation);
    return call_epilogue(u, bias, gate, shift, dim, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_tangents("epilogue", grads);
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor bias = optional(saved[1]), shift = optional(saved[3]);
    const auto dim = ctx->saved_data["dim"].toInt();
    const auto activation = ctx->saved_data["activation"].toStringView();
    // edges exist for the tensors that were given, in order
    std::size_t edge = 0;
    std::array<bool, 4> mask{};
    for (std::size_t i = 0; i < 4; ++i) mask[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    EpilogueGrads out;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      out = call_epilogue_backward(grads[0], saved[0], bias, saved[2], shift, dim, activation, mask);
    }
    auto& [grad_u, grad_bias, grad_gate, grad_shift] = out;
    variable_list gradients{grad_u, grad_bias, grad_gate, grad_shift, Tensor(), Tensor()};
    for (std::size_t i = 0; i < 4; ++i) {
      if (!mask[i]) gradients[i] = Tensor();
    }
    return once_differentiable("epilogue", std::move(gradients));
  }
};

}  // namespace

static Tensor forward(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                      std::int64_t dim, std::string_view activation, bool u_is_free) {
  check(u, bias, gate, shift, dim);
  const auto dtype = gate_dtype(u.scalar_type());
  const Parameters with(bias, gate, shift, activation, dtype);
  EpilogueShape shape;
  const Tensor values = dense(u, dim < 0 ? dim + u.dim() : dim, gate.dim() == 2, shape);
  const Tensor y = u_is_free ? values : fresh_like(values);
  dtype == at::kDouble ? launch_forward<double>(values, shape, with, y) : launch_forward<float>(values, shape, with, y);
  return restored(y, u);
}

Tensor epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                std::int64_t dim, std::string_view activation) {
  return forward(u, bias, gate, shift, dim, activation, false);
}

Tensor call_epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                     std::int64_t dim, std::string_view activation, bool u_is_free) {
  if (direct({&u, pointer(bias), &gate, pointer(shift)})) {
    return forward(u, bias, gate, shift, dim, activation, u_is_free);
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::epilogue", "").typed<decltype(epilogue)>();
  return op.call(u, bias, gate, shift, dim, activation);
}

static EpilogueGrads backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias, const Tensor& gate,
                              const OptionalTensor& shift, std::int64_t dim, std::string_view activation,
                              std::array<bool, 4> mask, EpilogueBackward how) {
  check(u, bias, gate, shift, dim);
  TORCH_CHECK_VALUE(grad.sizes() == u.sizes(), "epilogue_backward: grad has shape ", grad.sizes(), "; expected ",
                    u.sizes(), ", that of u");
  mask[1] = mask[1] && given(bias);
  mask[3] = mask[3] && given(shift);
  const auto dtype = gate_dtype(u.scalar_type());
  Parameters with(how.of_result ? std::nullopt : bias, gate, shift, activation, dtype);
  with.of_result = how.of_result;
  EpilogueShape shape;
  const Tensor values = dense(u, dim < 0 ? dim + u.dim() : dim, gate.dim() == 2, shape);
  Tensor incoming = grad;
  if (!same_layout(grad, values)) incoming = at::empty_like(values).copy_(grad);
  Tensor grad_u, grad_bias, grad_gate, grad_shift;
  if (mask[0]) grad_u = how.overwrite && !on_gpu(u) ? incoming : fresh_like(values);
  const bool sums = (mask[1] || mask[2] || mask[3]) && on_gpu(u);  // that come together
  if (mask[2] || sums) grad_gate = fresh_like(with.gate);
  if (mask[3] || sums) grad_shift = fresh_like(with.gate);
  if (mask[1]) grad_bias = fresh(bias->sizes(), dtype, with.gate);
  const EpilogueGrads grads{grad_u, grad_bias, grad_gate, grad_shift};
  dtype == at::kDouble ? launch_backward<double>(incoming, values, shape, with, grads)
                       : launch_backward<float>(incoming, values, shape, with, grads);
  const auto result = [&](bool wanted, const Tensor& value, const Tensor& like) {
    if (!wanted) return Tensor();
    return value.scalar_type() == like.scalar_type() ? value : value.to(like.scalar_type());
  };
  return {mask[0] ? restored(grad_u, u) : Tensor(), result(mask[1], grad_bias, bias.value_or(gate)),
          result(mask[2], grad_gate, gate), result(mask[3], grad_shift, shift.value_or(gate))};
}

EpilogueGrads epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias, const Tensor& gate,
                                const OptionalTensor& shift, std::int64_t dim, std::string_view activation,
                                std::array<bool, 4> mask) {
  return backward(grad, u, bias, gate, shift, dim, activation, mask, {});
}

EpilogueGrads call_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                     const Tensor& gate, const OptionalTensor& shift, std::int64_t dim,
                                     std::string_view activation, std::array<bool, 4> mask, EpilogueBackward how) {
  if (direct({&grad, &u, pointer(bias), &gate, pointer(shift)})) {
    return backward(grad, u, bias, gate, shift, dim, activation, mask, how);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mrvae::epilogue_backward", "")
                             .typed<decltype(epilogue_backward)>();
  return op.call(grad, u, bias, gate, shift, dim, activation, mask);
}

Tensor epilogue_autograd(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                         std::int64_t dim, std::string_view activation) {
  if (recording({&u, pointer(bias), &gate, pointer(shift)})) {
    return EpilogueNode::apply(u, bias, gate, shift, dim, activation);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_epilogue(u, bias, gate, shift, dim, activation);
}

}  // namespace mrvae
