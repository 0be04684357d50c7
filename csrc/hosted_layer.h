// A layer of a multi-rate network, called with nothing but its own tensors: the gates are those of the network's call.
#pragma once

#include <variant>

#include "gated_fold.h"
#include "products.h"

namespace mrvae {

// What the layers of one network share: the gates, while a call runs.
struct Stage : torch::CustomClassHolder {
  c10::intrusive_ptr<StepGates> gates;
  std::int64_t version = 0;  // of the layers' strides, paddings and the like
};

struct HostedLayer : torch::CustomClassHolder {
  using Product = std::variant<LinearProduct, ConvolutionProduct>;
  const c10::intrusive_ptr<Stage> stage;
  const std::int64_t gate, shift, inputs;  // slices of the gates; -1 for no shift, and for no gate on the inputs
  const Strategy strategy;         // fold or epilogue
  const Product product;
  const std::int64_t version;  // of the stage when it was made

  HostedLayer(c10::intrusive_ptr<Stage> stage_, std::int64_t gate_, std::int64_t shift_, std::int64_t inputs_,
              Strategy strategy_, Product product_)
      : stage(std::move(stage_)), gate(gate_), shift(shift_), inputs(inputs_), strategy(strategy_),
        product(std::move(product_)), version(stage->version) {}

  // y = activation(g (product(g_in x, weight) + bias) + t). None outside a call, for an x without a batch, and where a stride or
  // the like has changed.
  OptionalTensor run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Activation activation) const;

 private:
  OptionalTensor run_gated(const StepGates& step, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           Activation activation) const;
  OptionalTensor run_made(const StepGates& step, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          Activation activation) const;
};

// Whether all betas on the CPU, (N,) or 0-d, are positive and finite; none where it cannot be told without a dispatch.
std::optional<bool> all_positive(const Tensor& beta);

// eta = (log beta - mean) / std over the range [low, high].
double standardized(double beta, double low, double high);
// The same for betas on the CPU, (N,) or 0-d, in this dtype; none where one of them is outside, for whoever says what to
// do about it.
OptionalTensor standardized(const Tensor& beta, double low, double high, at::ScalarType dtype);

}  // namespace mrvae
