// The library's products that gated layers build on, with what their backward passes need.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <numeric>

#include "fused_products.h"

namespace mrvae {

struct ProductGrads {
  Tensor x, weight, bias;
};

// matrix.t() of an ordinary tensor whose history is of no interest, without the three operators of which torch makes it:
// 0.3 us each time.
inline Tensor transpose(const Tensor& matrix) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(matrix.storage()), matrix.key_set(),
                                                   matrix.dtype());
  const std::int64_t sizes[] = {matrix.size(1), matrix.size(0)}, strides[] = {matrix.stride(1), matrix.stride(0)};
  impl->set_sizes_and_strides(sizes, strides, matrix.storage_offset());
  return Tensor(std::move(impl));
}

struct LinearProduct {
  static constexpr const char* name = "gated_linear";
  static constexpr std::int64_t channel_axis = -1, fold_groups = 0;
  static constexpr bool reads_one_side = true;  // backward: x for the weight's gradient alone, the weight for that of x

  FusedLayer fused() const { return {}; }

  static std::int64_t rows(const Tensor& x) {
    const auto sizes = x.sizes();
    return std::accumulate(sizes.begin(), sizes.end() - 1, std::int64_t(1), std::multiplies<>());
  }
  static Tensor matrix(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({rows(x), x.size(-1)}); }

  Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    const Tensor flat = matrix(x), transposed = transpose(weight);
    const Tensor y = bias.defined() ? at::addmm(bias, flat, transposed) : at::mm(flat, transposed);
    if (x.dim() == 2) return y;
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    return y.view(sizes);
  }

  ProductGrads backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
    const Tensor flat = matrix(grad);
    ProductGrads out;
    if (mask[0]) {
      out.x = flat.mm(weight);
      if (grad.dim() != 2) {
        auto sizes = grad.sizes().vec();
        sizes.back() = weight.size(1);
        out.x = out.x.view(sizes);
      }
    }
    if (mask[1]) out.weight = transpose(flat).mm(matrix(x));
    if (mask[2]) out.bias = flat.sum(0);
    return out;
  }

  Tensor traced(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return at::linear(x, weight, bias);
  }

  void check(const Tensor& x, const Tensor& weight) const {
    TORCH_CHECK_VALUE(weight.dim() == 2, name, ": weight has shape ", weight.sizes(), "; expected (C, K)");
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), name, ": x has shape ", x.sizes(),
                      "; expected (..., ", weight.size(1), "), the weight's input features");
  }
};

struct ConvolutionProduct {
  static constexpr const char* name = "gated_convolution";
  static constexpr std::int64_t channel_axis = 1;
  static constexpr bool reads_one_side = false;  // torch's convolution_backward takes both
  std::vector<std::int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
  std::int64_t groups = 1, fold_groups = 0;

  ConvolutionProduct() = default;
  ConvolutionProduct(IntArrayRef s, IntArrayRef p, IntArrayRef d, bool t, IntArrayRef o, std::int64_t g)
      : stride(s.vec()), padding(p.vec()), dilation(d.vec()), output_padding(o.vec()), transposed(t), groups(g),
        fold_groups(t ? g : 0) {}

  FusedLayer fused() const { return {stride, padding, dilation, transposed, output_padding, groups}; }

  Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    return at::convolution(x, weight, optional(bias), stride, padding, dilation, transposed, output_padding, groups);
  }

  ProductGrads backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::array<bool, 3> mask) const {
    ProductGrads out;
    if (!mask[0] && !mask[1] && !mask[2]) return out;
    const std::int64_t channels[] = {grad.size(1)};
    std::tie(out.x, out.weight, out.bias) =
        at::convolution_backward(grad, x, weight, at::OptionalIntArrayRef(IntArrayRef(channels)), stride, padding,
                                 dilation, transposed, output_padding, groups, mask);
    return out;
  }

  Tensor traced(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return at::convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  void check(const Tensor& x, const Tensor& weight) const {
    const auto axes = stride.size();
    TORCH_CHECK_VALUE(axes >= 1 && axes <= 3 && padding.size() == axes && dilation.size() == axes &&
                          output_padding.size() == axes && groups >= 1,
                      name, ": got ", axes, " strides, ", padding.size(), " paddings, ", dilation.size(), " dilations, ",
                      output_padding.size(), " output paddings and groups = ", groups,
                      "; expected one of each a spatial axis, 1 to 3, and groups >= 1");
    TORCH_CHECK_VALUE(x.dim() == std::int64_t(axes) + 2 && weight.dim() == x.dim(), name, ": x has shape ", x.sizes(),
                      " and weight ", weight.sizes(), "; expected (N, C_in, ...) and a weight with ", axes,
                      " spatial axes");
    const std::int64_t inputs = transposed ? weight.size(0) : weight.size(1) * groups;
    TORCH_CHECK_VALUE(x.size(1) == inputs, name, ": x has shape ", x.sizes(), "; expected ", inputs,
                      " channels in axis 1, by the weight's shape ", weight.sizes(), " and groups = ", groups);
  }
};

}  // namespace mrvae
