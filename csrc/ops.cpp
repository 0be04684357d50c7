// Schemas, registrations and autocast; the Python module is in python.cpp.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops.h"

namespace mrvae {
namespace {

// Through the dispatcher a gradient that nobody asked for is an empty tensor: tracing wants a tensor for each result.
Tensor present(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor : at::empty({0}, like.options());
}

EpilogueGrads epilogue_backward_op(const Tensor& grad, const Tensor& u, const OptionalTensor& bias, const Tensor& gate,
                                   const OptionalTensor& shift, std::int64_t dim, std::string_view activation,
                                   std::array<bool, 4> mask) {
  const auto [du, db, dg, dt] = epilogue_backward(grad, u, bias, gate, shift, dim, activation, mask);
  return {present(du, u), present(db, bias.value_or(u)), present(dg, gate), present(dt, gate)};
}

EpilogueGrads sampled_epilogue_backward_op(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                           const Tensor& weight, const Tensor& gate_bias, const Tensor& eta,
                                           std::int64_t gate, std::int64_t shift, std::int64_t kind,
                                           std::string_view activation, bool of_result, std::array<bool, 4> mask) {
  const auto [du, db, sums, shift_sums] = sampled_epilogue_backward(grad, u, bias, weight, gate_bias, eta, gate, shift,
                                                                    kind, activation, of_result, mask);
  const auto like = eta.options().dtype(gate_dtype(u.scalar_type()));
  const auto given_or_empty = [&](const Tensor& tensor) { return tensor.defined() ? tensor : at::empty({0}, like); };
  return {present(du, u), present(db, bias.value_or(u)), given_or_empty(sums), given_or_empty(shift_sums)};
}

FoldGrads fold_backward_op(const OptionalTensorList& grad_weights, const OptionalTensorList& grad_biases,
                           TensorList weights, const OptionalTensorList& biases, TensorList gates,
                           const OptionalTensorList& shifts, IntArrayRef groups, const c10::List<bool>& mask) {
  FoldGrads out = fold_backward(grad_weights, grad_biases, weights, biases, gates, shifts, groups, mask);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    std::get<0>(out)[i] = present(std::get<0>(out)[i], weights[i]);
    std::get<1>(out)[i] = present(std::get<1>(out)[i], weights[i]);
    std::get<2>(out)[i] = present(std::get<2>(out)[i], gates[i]);
    std::get<3>(out)[i] = present(std::get<3>(out)[i], gates[i]);
  }
  return out;
}

// ---- autocast: inputs and weights of products take its dtype; gates, shifts and biases keep theirs, and so do folded
// weights: the product that takes them casts them, or does not, in a part of a network where autocast is off -----------

template <c10::DeviceType device>
struct Autocast {
  static constexpr c10::DispatchKey key =
      device == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;

  static Tensor cast(const Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }

  static Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                       const OptionalTensor& shift, std::string_view activation, std::string_view strategy) {
    const c10::impl::ExcludeDispatchKeyGuard guard(key);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::gated_linear", "").typed<decltype(gated_linear)>();
    return op.call(cast(x), cast(weight), bias, gate, shift, activation, strategy);
  }

  static Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                            const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                            bool transposed, IntArrayRef output_padding, std::int64_t groups,
                            std::string_view activation, std::string_view strategy) {
    const c10::impl::ExcludeDispatchKeyGuard guard(key);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mrvae::gated_convolution", "")
                               .typed<decltype(gated_convolution)>();
    return op.call(cast(x), cast(weight), bias, gate, shift, stride, padding, dilation, transposed, output_padding,
                   groups, activation, strategy);
  }

  static void register_in(torch::Library& m) {
    m.impl("gated_linear", linear);
    m.impl("gated_convolution", convolution);
  }
};

}  // namespace

TORCH_LIBRARY(mrvae, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("gates(Tensor weight, Tensor bias, Tensor eta, int[] sizes, int[] kinds) -> Tensor[]", tags);
  m.def("gates_backward(Tensor?[] grads, Tensor weight, Tensor bias, Tensor eta, int[] sizes, int[] kinds, "
        "bool eta_needs_grad) -> (Tensor, Tensor, Tensor)", tags);
  m.def("fold(Tensor[] weights, Tensor?[] biases, Tensor[] gates, Tensor?[] shifts, int[] groups) "
        "-> (Tensor[], Tensor[])", tags);
  m.def("fold_backward(Tensor?[] grad_weights, Tensor?[] grad_biases, Tensor[] weights, Tensor?[] biases, "
        "Tensor[] gates, Tensor?[] shifts, int[] groups, bool[] mask) -> (Tensor[], Tensor[], Tensor[], Tensor[])", tags);
  m.def("epilogue(Tensor u, Tensor? bias, Tensor gate, Tensor? shift, int dim, str activation) -> Tensor", tags);
  m.def("epilogue_backward(Tensor grad, Tensor u, Tensor? bias, Tensor gate, Tensor? shift, int dim, str activation, "
        "bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)", tags);
  m.def("sampled_epilogue(Tensor u, Tensor? bias, Tensor weight, Tensor gate_bias, Tensor eta, int gate, int shift, "
        "int kind, str activation) -> Tensor", tags);
  m.def("sampled_epilogue_backward(Tensor grad, Tensor u, Tensor? bias, Tensor weight, Tensor gate_bias, Tensor eta, "
        "int gate, int shift, int kind, str activation, bool of_result, bool[4] mask) "
        "-> (Tensor, Tensor, Tensor, Tensor)", tags);
  m.def("gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, str activation, "
        "str strategy) -> Tensor", tags);
  m.def("gated_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, int[] stride, "
        "int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, str activation, "
        "str strategy) -> Tensor", tags);
  m.def("fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, str activation, bool keep) "
        "-> (Tensor, Tensor)", tags);
  m.def("fused_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, Tensor? y, "
        "Tensor kept, str activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags);
  m.def("fused_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, int[] stride, "
        "int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, str activation, bool keep) "
        "-> (Tensor, Tensor)", tags);
  m.def("fused_convolution_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? shift, "
        "Tensor? y, Tensor kept, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, "
        "int groups, str activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags);
}

namespace {

// of the dispatch key of a device
void register_kernels(torch::Library& m) {
  m.impl("gates", gates);
  m.impl("gates_backward", gates_backward);
  m.impl("fold", fold);
  m.impl("fold_backward", fold_backward_op);
  m.impl("epilogue", epilogue);
  m.impl("epilogue_backward", epilogue_backward_op);
  m.impl("gated_linear", gated_linear);
  m.impl("gated_convolution", gated_convolution);
}

}  // namespace

TORCH_LIBRARY_IMPL(mrvae, CPU, m) {
  register_kernels(m);
  m.impl("sampled_epilogue", sampled_epilogue);
  m.impl("sampled_epilogue_backward", sampled_epilogue_backward_op);
}
#if defined(MRVAE_CUDA) && !defined(MRVAE_SHIM)
TORCH_LIBRARY_IMPL(mrvae, CUDA, m) { register_kernels(m); }
#endif

// On tensors that no kernel takes these say so.
template <class Library>
void register_fused(Library& m) {
  m.impl("fused_linear", fused_linear);
  m.impl("fused_linear_backward", fused_linear_backward);
  m.impl("fused_convolution", fused_convolution);
  m.impl("fused_convolution_backward", fused_convolution_backward);
}

TORCH_LIBRARY_IMPL(mrvae, CPU, m) { register_fused(m); }
TORCH_LIBRARY_IMPL(mrvae, CUDA, m) { register_fused(m); }

TORCH_LIBRARY_IMPL(mrvae, Autograd, m) {
  m.impl("fused_linear", fused_linear_autograd);
  m.impl("fused_convolution", fused_convolution_autograd);
  m.impl("gates", gates_autograd);
  m.impl("fold", fold_autograd);
  m.impl("epilogue", epilogue_autograd);
  m.impl("gated_linear", gated_linear_autograd);
  m.impl("gated_convolution", gated_convolution_autograd);
}

TORCH_LIBRARY_IMPL(mrvae, AutocastCPU, m) { Autocast<c10::DeviceType::CPU>::register_in(m); }
TORCH_LIBRARY_IMPL(mrvae, AutocastCUDA, m) { Autocast<c10::DeviceType::CUDA>::register_in(m); }

}  // namespace mrvae
