// What the fused kernels take, and the sizes of their results.
#include <algorithm>

#include "device.h"
#include "fused_products.h"

namespace mrvae {

FusedLayer::FusedLayer(IntArrayRef s, IntArrayRef p, IntArrayRef d, bool t, IntArrayRef o, std::int64_t g)
    : linear(false), transposed(t), groups(g) {
  TORCH_CHECK_VALUE(s.size() == 2 && p.size() == 2 && d.size() == 2 && o.size() == 2,
                    "fused_convolution: stride, padding, dilation and output_padding are ", s, ", ", p, ", ", d,
                    " and ", o, "; expected two numbers each");
  for (std::size_t i = 0; i < 2; ++i) stride[i] = s[i], padding[i] = p[i], dilation[i] = d[i], output_padding[i] = o[i];
}

namespace {

constexpr std::int64_t most_positions = 0x7fffffff - (1 << 16);  // positions are counted in 32 bits
constexpr std::int64_t fewest_channels = 16;                     // of a group: a tile would multiply zeros

}  // namespace

std::array<std::int64_t, 2> output_size(const FusedLayer& layer, const Tensor& x, const Tensor& weight) {
  std::array<std::int64_t, 2> out{};
  for (std::size_t i = 0; i < 2; ++i) {
    const std::int64_t in = x.size(2 + i), reach = layer.dilation[i] * (weight.size(2 + i) - 1) + 1;
    const std::int64_t span = in + 2 * layer.padding[i] - reach;
    out[i] = layer.transposed ? (in - 1) * layer.stride[i] - 2 * layer.padding[i] + reach + layer.output_padding[i]
             : span < 0       ? 0
                              : span / layer.stride[i] + 1;
  }
  return out;
}

namespace {

void check_convolution(const FusedLayer& layer, const Tensor& x, const Tensor& weight) {
  const char* name = layer.name();
  const IntArrayRef stride = layer.stride, dilation = layer.dilation;
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4, name, ": x has shape ", x.sizes(), " and weight ",
                    weight.sizes(), "; expected (N, C_in, H, W) and a weight with 4 axes: two of them are spatial");
  const auto least = [](const std::array<std::int64_t, 2>& values) { return std::min(values[0], values[1]); };
  TORCH_CHECK_VALUE(layer.groups >= 1 && least(layer.stride) >= 1 && least(layer.dilation) >= 1 &&
                        least(layer.padding) >= 0,
                    name, ": stride is ", stride, ", dilation ", dilation, ", padding ", IntArrayRef(layer.padding),
                    ", groups ", layer.groups, "; expected stride, dilation and groups from 1 up, padding from 0 up");
  const std::int64_t inputs = layer.transposed ? weight.size(0) : weight.size(1) * layer.groups;
  TORCH_CHECK_VALUE(x.size(1) == inputs && weight.size(0) % layer.groups == 0, name, ": x has shape ", x.sizes(),
                    "; expected ", inputs, " channels in axis 1, by the weight's shape ", weight.sizes(),
                    " and groups = ", layer.groups);
  for (std::size_t i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(layer.output_padding[i] >= 0 &&
                          layer.output_padding[i] < std::max(layer.stride[i], layer.dilation[i]),
                      name, ": output_padding is ", IntArrayRef(layer.output_padding),
                      "; expected less than the larger of stride ", stride, " and dilation ", dilation);
  }
  const std::int64_t few = std::min(weight.size(0) / layer.groups, weight.size(1));
  TORCH_CHECK_VALUE(layer.groups == 1 || few >= fewest_channels, name, ": groups = ", layer.groups, " leaves ", few,
                    " channels a group, and the tile of a matrix product takes ", fewest_channels, " at least");
  const auto out = output_size(layer, x, weight);
  TORCH_CHECK_VALUE(least(out) >= 1, name, ": x has shape ", x.sizes(), " and weight ", weight.sizes(),
                    ", which gives ", out[0], " x ", out[1], " results; expected at least 1 x 1");
  const std::int64_t positions =
      std::max(x.size(2) * x.size(3), (out[0] + layer.stride[0]) * (out[1] + layer.stride[1]));
  TORCH_CHECK_VALUE(x.size(0) * positions <= most_positions, name, ": x has shape ", x.sizes(),
                    ", which makes more than ", most_positions, " positions; positions are counted in 32 bits");
}

}  // namespace

void check_fused(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& gate, const OptionalTensor& shift) {
  const char* name = layer.name();
  TORCH_CHECK(on_gpu(x), name, ": x is on ", x.device(), "; the fused kernels need CUDA tensors, and a core that was ",
              "built with CUDA (python -m mrvae_kernels.doctor says whether it was)");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == weight.scalar_type(), name, ": x has dtype ", dtype, " and weight ", weight.scalar_type(),
                   "; expected the same dtype");
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name, ": x has dtype ", dtype,
                   "; expected float32, bfloat16 or float16");
  if (layer.linear) {
    TORCH_CHECK_VALUE(weight.dim() == 2, name, ": weight has shape ", weight.sizes(), "; expected (C, K)");
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), name, ": x has shape ", x.sizes(),
                      "; expected (..., ", weight.size(1), "), the weight's input features");
    TORCH_CHECK_VALUE(x.numel() / std::max<std::int64_t>(1, x.size(-1)) <= most_positions, name, ": x has shape ",
                      x.sizes(), "; expected at most ", most_positions, " rows, which are counted in 32 bits");
  } else {
    check_convolution(layer, x, weight);
  }
  const std::int64_t channels = layer.channels(weight);
  const bool shared = gate.dim() == 1 && gate.size(0) == channels;
  const bool per_sample = x.dim() >= 2 && gate.dim() == 2 && gate.size(0) == x.size(0) && gate.size(1) == channels;
  TORCH_CHECK_VALUE(shared || per_sample, name, ": gate has shape ", gate.sizes(), " for x of shape ", x.sizes(),
                    "; expected (C,) with C = ", channels, ", or (N, C) for x with N samples in axis 0");
  check_floating(name, "gate", gate);
  check_device(name, "weight", weight, x);
  check_device(name, "gate", gate, x);
  if (given(bias)) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == channels, name, ": bias has shape ", bias->sizes(),
                      "; expected (", channels, ",)");
    check_floating(name, "bias", *bias);
    check_device(name, "bias", *bias, x);
  }
  if (given(shift)) {
    TORCH_CHECK_VALUE(shift->sizes() == gate.sizes(), name, ": shift has shape ", shift->sizes(), "; expected ",
                      gate.sizes(), ", that of gate");
    check_floating(name, "shift", *shift);
    check_device(name, "shift", *shift, x);
  }
}

}  // namespace mrvae
