// Nodes of the autograd graph written out, where torch::autograd::Function costs more than the small kernels around it:
// it keeps what it saves in a dictionary of strings and looks every output up among its inputs.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace mrvae {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

// a std::shared_ptr in some releases of torch, a c10::intrusive_ptr in others
using NodePointer = decltype(Edge::function);

template <class T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>();
  } else {
    return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); });  // found by its argument: gone in later ones
  }
}

// Where the gradient of a tensor goes: nowhere if it has none.
inline Edge gradient_edge(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor) : Edge();
}

}  // namespace mrvae
