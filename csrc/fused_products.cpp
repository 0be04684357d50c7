// From tensors to the kernels of cuda/products.h.
#include "fused_products.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "cuda/products.h"
#include "device.h"

namespace mrvae {

#if defined(MRVAE_CUDA)

namespace {

constexpr std::int64_t packing_pays = std::int64_t(1) << 31;  // multiplications

cuda::Pair pair(const std::array<std::int64_t, 2>& values) { return {int(values[0]), int(values[1])}; }

bool keeps(Activation activation, const Tensor& gate) { return gate.dim() == 2 || saves_argument(activation); }

cuda::Numbers numbers_of(const FusedLayer& layer, const Tensor& x) {
  if (x.scalar_type() == at::kBFloat16) return cuda::Numbers::BFloat16;
  if (x.scalar_type() == at::kHalf) return cuda::Numbers::Half;
  const auto op = layer.linear ? at::Float32Op::MATMUL : at::Float32Op::CONV;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, op);
  return precision == at::Float32Precision::TF32 ? cuda::Numbers::Tf32 : cuda::Numbers::Float;
}

cuda::Parameter parameter_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return cuda::Parameter::BFloat16;
    case at::kHalf: return cuda::Parameter::Half;
    case at::kDouble: return cuda::Parameter::Double;
    default: return cuda::Parameter::Float;
  }
}

// A linear layer's (..., K) as (rows, K): a view where two strides are enough, else a copy.
Tensor positioned(const FusedLayer& layer, const Tensor& tensor) {
  if (!layer.linear || !tensor.defined() || tensor.dim() == 2) return tensor;
  const auto sizes = tensor.sizes();
  return tensor.reshape({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});
}

cuda::View view_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  const auto strides = tensor.strides();
  if (tensor.dim() == 2) return {tensor.const_data_ptr(), strides[0], strides[1], 0, 0};
  return {tensor.const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

cuda::Pair size_of(const Tensor& tensor) {
  if (tensor.dim() == 2) return {1, 1};
  return {int(tensor.size(2)), int(tensor.size(3))};
}

cuda::Pair taps_of(const Tensor& weight) { return size_of(weight); }

// y += product of x and weight, `transposed` or not, over axis 0 of the weight where `over_rows`.
cuda::Convolution product_of(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const Tensor& y,
                             bool transposed, bool over_rows) {
  cuda::Convolution what{};
  what.numbers = numbers_of(layer, x);
  what.transposed = transposed;
  what.samples = int(x.size(0)), what.groups = int(layer.groups);
  const std::int64_t rows = weight.size(0) / layer.groups;
  what.channels = int(over_rows ? rows : weight.size(1)), what.columns = int(over_rows ? weight.size(1) : rows);
  what.in = size_of(x), what.out = size_of(y), what.kernel = taps_of(weight);
  what.stride = pair(layer.stride), what.padding = pair(layer.padding), what.dilation = pair(layer.dilation);
  what.x = view_of(x), what.y = view_of(y), what.weight = view_of(weight);
  if (over_rows) std::swap(what.weight.n, what.weight.c);
  what.weight_group = rows * weight.stride(0);
  what.rows_per_gate = 1;
  return what;
}

// The weight with its channels innermost, where taps are and the product is worth the copy.
Tensor packed(const Tensor& weight, const Tensor& y) {
  if (weight.dim() != 4 || weight.stride(1) == 1 || weight.size(2) * weight.size(3) == 1) return weight;
  const double work = double(y.numel()) * double(weight.numel()) / double(std::max<std::int64_t>(1, weight.size(0)));
  return work >= double(packing_pays) ? weight.contiguous(at::MemoryFormat::ChannelsLast) : weight;
}

bool is_channels_last(const Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

}  // namespace

FusedResult fused_forward(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& gate, const OptionalTensor& shift, Activation activation, bool keep) {
  check_fused(layer, x, weight, bias, gate, shift);
  FusedResult out;
  if (layer.linear) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    out.y = at::empty(sizes, x.options());
  } else {
    const auto size = output_size(layer, x, weight);
    out.y = at::empty({x.size(0), layer.channels(weight), size[0], size[1]},
                      x.options().memory_format(is_channels_last(x) ? at::MemoryFormat::ChannelsLast
                                                                    : at::MemoryFormat::Contiguous));
  }
  const bool per_sample = gate.dim() == 2;
  if (keep && keeps(activation, gate)) out.kept = at::empty_like(out.y);
  if (out.y.numel() == 0) return out;
  const Tensor from = positioned(layer, x), to = positioned(layer, out.y);
  const Tensor used = packed(weight, out.y), gates = operand(gate, at::kFloat);
  const Tensor shifts = given(shift) ? operand(*shift, at::kFloat) : Tensor();
  const Tensor biases = given(bias) ? bias->contiguous() : Tensor();
  cuda::Convolution what = product_of(layer, from, used, to, layer.transposed, layer.transposed);
  if (out.kept.defined()) what.kept = view_of(positioned(layer, out.kept));
  if (biases.defined()) what.bias = biases.const_data_ptr(), what.bias_type = parameter_of(biases);
  what.gate = gates.const_data_ptr<float>();
  if (shifts.defined()) what.shift = shifts.const_data_ptr<float>();
  what.per_sample = what.keep_product = per_sample;
  what.rows_per_gate = per_sample ? int(from.size(0) / gate.size(0)) : 1;
  what.activation = activation;
  const Launch at(x);
  cuda::convolve(what, processors(x), at.stream());
  return out;
}

FusedGrads fused_backward(const FusedLayer& layer, const Tensor& grad, const Tensor& x, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift, const Tensor& y,
                          const Tensor& kept, Activation activation, std::array<bool, 5> mask) {
  check_fused(layer, x, weight, bias, gate, shift);
  const char* name = layer.name();
  const std::int64_t channels = layer.channels(weight);
  auto expected = x.sizes().vec();
  expected[std::size_t(layer.linear ? x.dim() - 1 : 1)] = channels;
  if (!layer.linear) std::copy_n(output_size(layer, x, weight).begin(), 2, expected.begin() + 2);
  TORCH_CHECK_VALUE(grad.sizes() == IntArrayRef(expected), name, "_backward: grad has shape ", grad.sizes(),
                    "; expected ", expected, ", the result's");
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), name, "_backward: grad has dtype ", grad.scalar_type(),
                   "; expected ", x.scalar_type(), ", the result's");
  check_device(name, "grad", grad, x);
  auto [want_x, want_weight, want_bias, want_gate, want_shift] = mask;
  want_bias = want_bias && given(bias), want_shift = want_shift && given(shift);
  const bool per_sample = gate.dim() == 2;

  FusedGrads out;
  Tensor dy = grad, saved;
  if (per_sample) {
    // without gate gradient and activation u has no influence, and may not be there
    const bool has_u = kept.defined() && kept.sizes() == grad.sizes();
    TORCH_CHECK_VALUE(has_u || (activation == Activation::None && !want_gate), name,
                      "_backward: kept is not the product of the forward pass, which one gate a sample needs");
    std::tie(dy, out.bias, out.gate, out.shift) =
        call_epilogue_backward(grad, has_u ? kept : grad, bias, gate, shift, layer.channel_axis(grad),
                               activation_name(activation), {want_x || want_weight, want_bias, want_gate, want_shift});
    activation = Activation::None;
    want_bias = want_gate = want_shift = false;
  } else if (activation != Activation::None) {
    saved = saves_argument(activation) ? kept : y;
    TORCH_CHECK_VALUE(saved.defined() && saved.sizes() == grad.sizes(), name, "_backward: activation ",
                      activation_name(activation), " needs ", saves_argument(activation) ? "kept" : "y",
                      " from the forward pass, of shape ", grad.sizes());
  }
  if (!want_x && !want_weight && !want_bias && !want_gate && !want_shift) return out;

  const Launch at(x);
  const int cores = processors(x);
  const Tensor from = positioned(layer, x), incoming = positioned(layer, dy), state = positioned(layer, saved);
  const Tensor gates = per_sample ? Tensor() : operand(gate, at::kFloat);
  if (want_x) {
    out.x = at::empty_like(x);
    // (..., K) with axes that do not merge: through a matrix
    const bool direct = !layer.linear || x.dim() == 2 || out.x.is_contiguous();
    const Tensor target = direct ? positioned(layer, out.x) : at::empty(from.sizes(), x.options());
    const Tensor used = packed(weight, grad);
    cuda::Convolution what = product_of(layer, incoming, used, target, !layer.transposed && !layer.linear,
                                        !layer.transposed);
    what.saved = view_of(state), what.activation = activation;
    what.prologue_gate = per_sample ? nullptr : gates.const_data_ptr<float>();
    cuda::convolve(what, cores, at.stream());
    if (!direct) out.x.copy_(target.view(x.sizes()));
  }

  const bool any_product = (want_weight || want_gate) && incoming.numel() > 0 && from.numel() > 0 && weight.numel() > 0;
  const bool want_sums = want_bias || want_shift || (want_gate && given(bias));
  Tensor parts, sums;
  cuda::Finish last{};
  if (any_product) {
    cuda::WeightGradient what{};
    const Tensor &a = layer.transposed ? from : incoming, &b = layer.transposed ? incoming : from;
    what.numbers = numbers_of(layer, x), what.slope_of_a = !layer.transposed;
    what.samples = int(a.size(0)), what.groups = int(layer.groups);
    what.a_channels = int(weight.size(0) / layer.groups), what.b_channels = int(weight.size(1));
    what.a_size = size_of(a), what.b_size = size_of(b), what.kernel = taps_of(weight);
    what.stride = pair(layer.stride), what.padding = pair(layer.padding), what.dilation = pair(layer.dilation);
    what.a = view_of(a), what.b = view_of(b), what.saved = view_of(state), what.activation = activation;
    cuda::plan_parts(what, cores);
    last.splits = last.sum_splits = what.splits;
    parts = at::empty({what.splits, weight.numel()}, x.options().dtype(at::kFloat));
    what.parts = parts.mutable_data_ptr<float>();
    // not along with TF32's products, whose operands are rounded to 10 bits: the library sums biases in float32
    if (want_sums && !layer.transposed && what.numbers != cuda::Numbers::Tf32) {
      sums = at::empty({what.splits, channels}, parts.options());
      what.sums = sums.mutable_data_ptr<float>();
    }
    cuda::weight_gradient(what, cores, at.stream());
    last.parts = what.parts;
  }
  if (want_sums && !sums.defined()) {
    const auto sizes = size_of(incoming);
    cuda::ChannelSums what{parameter_of(grad), int(incoming.size(0)), int(channels),   sizes, view_of(incoming),
                           view_of(state),     activation,            nullptr,         1};
    what.splits = last.sum_splits = cuda::sum_splits(what, cores);
    sums = at::empty({what.splits, channels}, x.options().dtype(at::kFloat));
    what.parts = sums.mutable_data_ptr<float>();
    cuda::channel_sums(what, at.stream());
  }
  const auto contiguous_like = [](const Tensor& like) { return at::empty(like.sizes(), like.options()); };
  const Tensor biases = given(bias) ? bias->contiguous() : Tensor();
  if (want_weight) {
    out.weight = any_product ? at::empty_like(weight) : at::zeros_like(weight);
    const cuda::View view = view_of(out.weight);
    last.grad_row = view.n, last.grad_column = view.c, last.grad_r = view.h, last.grad_s = view.w;
    if (any_product) last.grad_weight = out.weight.mutable_data_ptr();
  }
  const auto kept_in_float = [&](bool wanted) { return wanted ? at::empty(gate.sizes(), gates.options()) : Tensor(); };
  const Tensor dg = kept_in_float(want_gate), dt = kept_in_float(want_shift);
  if (want_bias) out.bias = contiguous_like(*bias);
  const cuda::View view = view_of(weight);
  last.sums = sums.defined() ? sums.const_data_ptr<float>() : nullptr;
  last.rows = int(weight.size(0)), last.columns = int(weight.size(1));
  last.kernel_width = std::max(1, taps_of(weight).w), last.taps = taps_of(weight).h * taps_of(weight).w;
  last.groups = layer.transposed ? int(layer.groups) : 0;
  last.type = parameter_of(weight), last.weight = weight.const_data_ptr();
  if (biases.defined()) last.bias = biases.const_data_ptr(), last.bias_type = parameter_of(biases);
  last.gate = per_sample ? nullptr : gates.const_data_ptr<float>();
  last.weight_row = view.n, last.weight_column = view.c, last.weight_r = view.h, last.weight_s = view.w;
  if (want_bias) last.grad_bias = out.bias.mutable_data_ptr();
  if (want_gate) last.grad_gate = dg.mutable_data_ptr<float>();
  if (want_shift) last.grad_shift = dt.mutable_data_ptr<float>();
  if (want_weight || want_bias || want_gate || want_shift) cuda::finish(last, at.stream());
  if (want_gate) out.gate = dg.to(gate.scalar_type());
  if (want_shift) out.shift = dt.to(shift->scalar_type());
  return out;
}

#else

FusedResult fused_forward(const FusedLayer& layer, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& gate, const OptionalTensor& shift, Activation, bool) {
  check_fused(layer, x, weight, bias, gate, shift);
  return {};
}

FusedGrads fused_backward(const FusedLayer& layer, const Tensor&, const Tensor& x, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& gate, const OptionalTensor& shift, const Tensor&,
                          const Tensor&, Activation, std::array<bool, 5>) {
  check_fused(layer, x, weight, bias, gate, shift);
  return {};
}

#endif

}  // namespace mrvae
