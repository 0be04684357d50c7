// A gated product in one kernel, and its gradients: what fused_products.cpp computes and fused_autograd.cpp records.
#pragma once

#include "ops.h"

namespace mrvae {

// A linear layer, or a convolution of two spatial axes.
struct FusedLayer {
  bool linear = true, transposed = false;
  std::array<std::int64_t, 2> stride{1, 1}, padding{0, 0}, dilation{1, 1}, output_padding{0, 0};
  std::int64_t groups = 1;

  FusedLayer() = default;
  // ValueError unless each is two numbers.
  FusedLayer(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
             std::int64_t groups);
  const char* name() const { return linear ? "fused_linear" : "fused_convolution"; }
  std::int64_t channel_axis(const Tensor& y) const { return linear ? y.dim() - 1 : 1; }
  std::int64_t channels(const Tensor& weight) const { return transposed ? weight.size(1) * groups : weight.size(0); }
};

struct FusedResult {
  Tensor y, kept;  // kept: u for one gate a sample, z for SiLU and GELU, undefined otherwise
};
struct FusedGrads {
  Tensor x, weight, bias, gate, shift;  // undefined where not wanted
};

// Errors that name the argument and what was expected, unless the kernels take all of these.
void check_fused(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& gate, const OptionalTensor& shift);
// Height and width of a convolution's y.
std::array<std::int64_t, 2> output_size(const FusedLayer& layer, const Tensor& x, const Tensor& weight);
FusedResult fused_forward(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& gate, const OptionalTensor& shift, Activation activation, bool keep);
// y and kept: undefined where the forward pass gives none, or the backward pass reads none.
FusedGrads fused_backward(const FusedLayer& layer, const Tensor& grad, const Tensor& x, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift, const Tensor& y,
                          const Tensor& kept, Activation activation, std::array<bool, 5> mask);
// With autograd: eager or, where something traces, through the operators fused_linear and fused_convolution.
Tensor fused_autograd(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& gate, const OptionalTensor& shift, Activation activation);

}  // namespace mrvae
