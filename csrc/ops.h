// The operators of namespace mrvae as C++ functions on tensors, and what their files share. Schemas are in ops.cpp.
//
//   <op>            the backend's kernel: checks, allocates, launches; no autograd
//   <op>_autograd   registered at the Autograd key: one node an operator
//   <op>_backward   an operator of its own, so that a traced backward pass stays visible to torch.compile; gradients that
//                   nobody asked for are undefined in C++, and empty tensors (0,) through the dispatcher
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace mrvae {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensorList = c10::List<OptionalTensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- shared helpers (common.cpp) ----------------------------------------------------------------------------------

// True when every defined tensor is an ordinary dense tensor of a real device and no tracing or dispatch mode is active:
// then kernels may be called without the dispatcher, and fresh buffers may be overwritten.
bool eager(std::initializer_list<const Tensor*> tensors);
// A gradient that a backward pass may read as it lies in memory: its values written out where a view negates them lazily
// or they are known to be zero. NotImplementedError for one of no ordinary tensor. A dispatch mode may be on, as one is
// that counts what a backward pass alone does.
Tensor incoming(const char* op, const Tensor& grad);
// eager(), and this build has kernels for the tensors' device, the first one's.
inline bool direct(std::initializer_list<const Tensor*> tensors) {
  return has_kernels(**tensors.begin()) && eager(tensors);
}
inline const Tensor* pointer(const OptionalTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; }
inline OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
inline bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// A gradient buffer that only this node holds, as such or as a view of all of it: what may be overwritten, and handed on,
// where its layout is that of the result.
bool ours(const Tensor& grad);

// Whether autograd records at all here, and whether it has to for one of these tensors.
bool records();
bool recording(std::initializer_list<const Tensor*> tensors);

// NotImplementedError for a tensor with a forward-mode tangent, which a node written out here would drop, or hand on.
void refuse_tangents(const char* op, std::initializer_list<const Tensor*> tensors);
void refuse_tangents(const char* op, TensorList gradients);

// The gradients, behind a node that raises when one differentiates through them (under create_graph=True).
variable_list once_differentiable(const char* op, variable_list gradients);

// float64 for float64, float32 for every other floating dtype: the dtype of gates and of accumulation
at::ScalarType gate_dtype(at::ScalarType dtype);
void check_floating(const char* op, const char* name, const Tensor& tensor);
void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& reference);

// The tensor itself where it is contiguous and of this dtype already; otherwise a converted copy.
Tensor operand(const Tensor& tensor, at::ScalarType dtype);
Storage storage_of(const Tensor& tensor);
// On the CPU float16 is computed in a float32 copy.
inline Tensor widened(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf && !on_gpu(tensor) ? tensor.to(at::kFloat) : tensor;
}
// at::empty and at::empty_like; on the CPU without the dispatcher, which asks twice and costs 0.3 us of the 0.45.
Tensor fresh(IntArrayRef sizes, at::ScalarType dtype, const Tensor& like);
Tensor fresh_like(const Tensor& like);
// Memory of so many bytes on the device of `like`, for the sums of a CUDA kernel.
Tensor scratch(std::int64_t bytes, const Tensor& like);

// The order of u's elements in memory as samples, rows, channels and the rest. False where u is not one dense block with
// the samples, if they matter, outermost.
bool memory_order(const Tensor& u, std::int64_t axis, bool per_sample, EpilogueShape& shape);
// u as one dense block that memory_order() accepts, its shape in `shape`
Tensor dense(const Tensor& u, std::int64_t axis, bool per_sample, EpilogueShape& shape);
// nullptr for an undefined tensor
template <class T>
const T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}
// `value`, computed densely, with the dtype and strides that at::empty_like(like) has.
Tensor restored(const Tensor& value, const Tensor& like);
bool same_layout(const Tensor& a, const Tensor& b);

Activation parse_activation(std::string_view name);
std::string_view activation_name(Activation activation);
enum class Strategy { Fold, Epilogue, Fused };
Strategy parse_strategy(std::string_view name);

// The library's activation, in place where it can (activate_), and its gradient from `saved`: the result for relu, tanh,
// leaky_relu and elu, the argument for silu and gelu.
Tensor activate(const Tensor& z, Activation activation);
Tensor activate_(const Tensor& z, Activation activation);
bool saves_argument(Activation activation);
Tensor activation_gradient(const Tensor& grad, const Tensor& saved, Activation activation);

// ---- gates ---------------------------------------------------------------------------------------------------------

// weight is w (C,), or w_0, w_1, ... (degree, C) of gates that are polynomials of eta; bias is c (C,).
inline int gate_degree(const Tensor& weight) { return weight.dim() == 1 ? 1 : int(weight.size(0)); }
// Where they lie, contiguous
template <class T>
GateParameters<const T> gate_parameters(const Tensor& weight, const Tensor& bias) {
  return {weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), bias.numel(), gate_degree(weight)};
}
// Where their gradients go
template <class T>
GateParameters<T> gate_gradients(const Tensor& weight, const Tensor& bias) {
  return {weight.mutable_data_ptr<T>(), bias.mutable_data_ptr<T>(), bias.numel(), gate_degree(weight)};
}
void check_gates(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes, IntArrayRef kinds);
std::vector<Tensor> gates(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                          IntArrayRef kinds);
std::vector<Tensor> gates_autograd(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                                   IntArrayRef kinds);
// The same without autograd for tensors that are direct(), for a node that keeps the values to itself: on the CPU they
// are parts of one block of memory.
std::vector<Tensor> gates_together(const Tensor& weight, const Tensor& bias, const Tensor& eta, IntArrayRef sizes,
                                   IntArrayRef kinds);

using GateGrads = std::tuple<Tensor, Tensor, Tensor>;  // weight, bias, eta

GateGrads gates_backward(const OptionalTensorList& grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                         IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad);
// The kernel, and the operator through the dispatcher, for nodes; undefined tensors stand for no gradient.
GateGrads gates_gradients(TensorList grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                          IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad);
GateGrads call_gates_backward(TensorList grads, const Tensor& weight, const Tensor& bias, const Tensor& eta,
                              IntArrayRef sizes, IntArrayRef kinds, bool eta_needs_grad);

// ---- epilogue ------------------------------------------------------------------------------------------------------

using EpilogueGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // u, bias, gate, shift

Tensor epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                std::int64_t dim, std::string_view activation);
Tensor epilogue_autograd(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                         std::int64_t dim, std::string_view activation);
EpilogueGrads epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias, const Tensor& gate,
                                const OptionalTensor& shift, std::int64_t dim, std::string_view activation,
                                std::array<bool, 4> mask);

// The kernels for ordinary tensors of a device that this build has them for, the operators for the rest.
// u_is_free: nobody reads u afterwards, so that y may take its memory.
Tensor call_epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                     std::int64_t dim, std::string_view activation, bool u_is_free = false);
// How a node of ours may have it computed.
struct EpilogueBackward {
  bool overwrite = false;  // grad is nobody else's: du may take its memory
  bool of_result = false;  // u is y, of no activation or ReLU; direct() tensors of the CPU only
};
EpilogueGrads call_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                     const Tensor& gate, const OptionalTensor& shift, std::int64_t dim,
                                     std::string_view activation, std::array<bool, 4> mask, EpilogueBackward how = {});

// The epilogue of u (N, C) with one beta a sample, by what its gates are made of: w (S,) or (degree, S) and c (S,) of all
// gates, of which this layer's begin at `gate` and its shifts at `shift` (-1 for none), and eta (N,). For graphs that
// torch.compile makes; a network's own layers call sample_epilogue() of sample_gates.h.
Tensor sampled_epilogue(const Tensor& u, const OptionalTensor& bias, const Tensor& weight, const Tensor& gate_bias,
                        const Tensor& eta, std::int64_t gate, std::int64_t shift, std::int64_t kind,
                        std::string_view activation);
// du, db, then (dw_0, ..., dc) of the gates and of the shifts, (degree + 1, C). u is y where `of_result`.
EpilogueGrads sampled_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                        const Tensor& weight, const Tensor& gate_bias, const Tensor& eta,
                                        std::int64_t gate, std::int64_t shift, std::int64_t kind,
                                        std::string_view activation, bool of_result, std::array<bool, 4> mask);

// ---- fold ----------------------------------------------------------------------------------------------------------

using Folded = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;  // weights, biases
// gradients of the weights, biases, gates and shifts
using FoldGrads = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

Folded fold(TensorList weights, const OptionalTensorList& biases, TensorList gates, const OptionalTensorList& shifts,
            IntArrayRef groups);
Folded fold_autograd(TensorList weights, const OptionalTensorList& biases, TensorList gates,
                     const OptionalTensorList& shifts, IntArrayRef groups);
FoldGrads fold_backward(const OptionalTensorList& grad_weights, const OptionalTensorList& grad_biases,
                        TensorList weights, const OptionalTensorList& biases, TensorList gates,
                        const OptionalTensorList& shifts, IntArrayRef groups, const c10::List<bool>& mask);

// The operators through the dispatcher.
Folded call_fold(TensorList weights, const OptionalTensorList& biases, TensorList gates,
                 const OptionalTensorList& shifts, IntArrayRef groups);
FoldGrads call_fold_backward(const OptionalTensorList& grad_weights, const OptionalTensorList& grad_biases,
                             TensorList weights, const OptionalTensorList& biases, TensorList gates,
                             const OptionalTensorList& shifts, IntArrayRef groups, const c10::List<bool>& mask);

// One layer, for nodes that own their buffers; undefined tensors stand for what a layer lacks.
struct Layer {
  Tensor weight, bias, gate, shift;
  std::int64_t groups;
};
struct LayerFolded {
  Tensor weight, bias;
};
struct LayerRequest {
  Tensor grad_weight, grad_bias;     // dW' and db', or undefined for zero
  bool weight, bias, gate, shift;    // the gradients wanted
  bool overwrite;                    // dW' is nobody else's: dW may take its memory
};
struct LayerGrads {
  Tensor weight, bias, gate, shift;
};
// The kernels, for any number of layers.
std::vector<LayerFolded> fold_layers(const std::vector<Layer>& layers);
// As the operator returns them: an empty tensor (0,) for the bias of a layer that has none.
Folded as_lists(std::vector<LayerFolded> layers);
std::vector<LayerGrads> fold_layers_backward(const std::vector<Layer>& layers,
                                             const std::vector<LayerRequest>& requests);
// One layer: the kernel where direct(), the operator for the rest.
LayerFolded fold_layer(const Layer& layer);
LayerGrads fold_layer_backward(const Layer& layer, const LayerRequest& request);

// ---- gated products ------------------------------------------------------------------------------------------------

Tensor gated_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                    const OptionalTensor& shift, std::string_view activation, std::string_view strategy);
Tensor gated_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                             const OptionalTensor& shift, std::string_view activation, std::string_view strategy);
Tensor gated_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                         const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         bool transposed, IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                         std::string_view strategy);
Tensor gated_convolution_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gate,
                                  const OptionalTensor& shift, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                                  std::int64_t groups, std::string_view activation, std::string_view strategy);

// ---- fused products, of GPU tensors: (y, kept), and the gradients of x, weight, bias, gate and shift ----------------

using FusedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> fused_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& gate, const OptionalTensor& shift, std::string_view activation,
                                        bool keep);
std::tuple<Tensor, Tensor> fused_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 const Tensor& gate, const OptionalTensor& shift,
                                                 std::string_view activation, bool keep);
FusedGradients fused_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                                     const OptionalTensor& y, const Tensor& kept, std::string_view activation,
                                     std::array<bool, 5> mask);
std::tuple<Tensor, Tensor> fused_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const Tensor& gate, const OptionalTensor& shift, IntArrayRef stride,
                                             IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                             IntArrayRef output_padding, std::int64_t groups,
                                             std::string_view activation, bool keep);
std::tuple<Tensor, Tensor> fused_convolution_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                      const Tensor& gate, const OptionalTensor& shift,
                                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                      bool transposed, IntArrayRef output_padding, std::int64_t groups,
                                                      std::string_view activation, bool keep);
FusedGradients fused_convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift,
                                          const OptionalTensor& y, const Tensor& kept, IntArrayRef stride,
                                          IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                          IntArrayRef output_padding, std::int64_t groups, std::string_view activation,
                                          std::array<bool, 5> mask);

}  // namespace mrvae
