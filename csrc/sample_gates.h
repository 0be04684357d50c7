// One beta a sample: a Linear has as many gates as results. Its node makes them where it needs them, forward and
// backward, a few hundred at a time, and hands on the sums over the samples that dw and dc are: no (N, C) gates and no
// (N, C) gradients of theirs, which were a quarter of a linear network's memory.
#pragma once

#include <memory>

#include "ops.h"

namespace mrvae {

// What the gates of one call are made of, kept by the nodes that make them.
class GateSource {
 public:
  // Nothing where the gates' values have to be there: for one beta, on a GPU, for an eta that gets a gradient, and for
  // a weight and bias of half the precision of gates.
  static std::shared_ptr<const GateSource> make(const Tensor& weight, const Tensor& bias, const Tensor& eta);

  // RuntimeError where one of the tensors was changed in place since; as of any weight, `.data` does not show.
  void check_unchanged() const;

  Tensor weight, bias, eta;  // contiguous, and of the dtype of gates; weight (C,), or (degree, C)

 private:
  struct Origin {
    Tensor tensor;
    std::uint32_t version;
  };
  std::vector<Origin> origins_;
};

// The gates of one layer: (N, C) by its part of the parameters and eta (N,).
struct SampleGates {
  std::shared_ptr<const GateSource> source;
  std::int64_t offset = 0, size = 0;  // of the slice
  Gate kind = Gate::Identity;
  std::int64_t shift = -1;  // the offset of the layer's shift, which is made likewise; -1 for none

  explicit operator bool() const { return source != nullptr; }
  std::int64_t sums() const { return gate_degree(source->weight) + 1; }  // rows: dw_0, dw_1, ..., dc
  // Whether they are those of a Linear's call: x (N, K), weight (C, K) and bias (C,), computed in the dtype of the gates.
  bool fit(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const;
  Tensor values() const;  // (N, C), where they are needed nevertheless
  // Whether y tells u + b for all of them: divisible() or, with a shift, separable() of cpu/kernels.h.
  bool divide() const;
};

// Whether |dg/dp| <= g, so that dp has no more than the rounding of y where it comes from (y - t) / g.
inline bool slope_within_value(Gate kind) { return kind == Gate::Sigmoid || kind == Gate::Softplus; }

std::vector<SampleGates> slices_of(const std::shared_ptr<const GateSource>& source, IntArrayRef sizes,
                                   IntArrayRef kinds);
// Adds the sums of the slices that have some to their places in the gradients.
void add_sums(IntArrayRef sizes, TensorList sums, const Tensor& grad_weight, const Tensor& grad_bias);

// y = activation(g * (u + b) + t) of u (N, C). u_is_free: as in call_epilogue().
Tensor sample_epilogue(const Tensor& u, const OptionalTensor& bias, const SampleGates& gates, Activation activation,
                       bool u_is_free);
// As call_epilogue_backward(), but the gradients of gates and shifts are the sums, (degree + 1, C).
EpilogueGrads sample_epilogue_backward(const Tensor& grad, const Tensor& u, const OptionalTensor& bias,
                                       const SampleGates& gates, Activation activation, std::array<bool, 4> mask,
                                       EpilogueBackward how);

}  // namespace mrvae
