#include "sample_norm.h"

#include <ATen/ops/batch_norm_update_stats.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "cpu/kernels.h"

namespace mrvae {
namespace {

constexpr const char* name = "batch norm with one beta a sample";

Tensor contiguous(const OptionalTensor& tensor) { return given(tensor) ? tensor->contiguous() : Tensor(); }

// -mean and rstd, (C,) each, of their own memory: a later step changes the running ones, and tells no version counter.
template <class T>
std::pair<Tensor, Tensor> statistics(const Tensor& mean, const Tensor& variance, double eps) {
  const Tensor minus_mean = fresh_like(mean), rstd = fresh_like(mean);
  const T *m = mean.const_data_ptr<T>(), *v = variance.const_data_ptr<T>();
  T *minus = minus_mean.mutable_data_ptr<T>(), *r = rstd.mutable_data_ptr<T>();
  for (std::int64_t c = 0; c < mean.numel(); ++c) {
    minus[c] = -m[c];
    r[c] = T(1) / std::sqrt(v[c] + T(eps));
  }
  return {minus_mean, rstd};
}

// The affine a sample and a channel.
template <class T>
struct Affine {
  std::int64_t samples, channels;
  const T *gate, *shift, *weight, *bias;
  T scale(std::int64_t n, std::int64_t c) const {
    const T g = gate[n * channels + c];
    return weight == nullptr ? g : g * weight[c];
  }
  T offset(std::int64_t n, std::int64_t c) const {
    const T t = shift == nullptr ? T(0) : shift[n * channels + c];
    return bias == nullptr ? t : gate[n * channels + c] * bias[c] + t;
  }
};

template <class T>
Tensor gain_of(const Affine<T>& affine, const Tensor& gate, const Tensor& rstd) {
  const Tensor gain = fresh_like(gate);
  T* out = gain.mutable_data_ptr<T>();
  const T* r = rstd.const_data_ptr<T>();
  for (std::int64_t n = 0; n < affine.samples; ++n) {
    for (std::int64_t c = 0; c < affine.channels; ++c) *out++ = affine.scale(n, c) * r[c];
  }
  return gain;
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& gate, const OptionalTensor& shift, const OptionalTensor& weight,
               const OptionalTensor& bias, const Tensor& minus_mean, const Tensor& rstd) {
  const Tensor g = gate.contiguous(), t = contiguous(shift), w = contiguous(weight), b = contiguous(bias);
  const Affine<T> affine{g.size(0), g.size(1), data<T>(g), data<T>(t), data<T>(w), data<T>(b)};
  Tensor offset = t;
  if (b.defined()) {
    offset = fresh_like(g);
    T* out = offset.mutable_data_ptr<T>();
    for (std::int64_t n = 0; n < affine.samples; ++n) {
      for (std::int64_t c = 0; c < affine.channels; ++c) *out++ = affine.offset(n, c);
    }
  }
  return call_epilogue(x, minus_mean, gain_of(affine, g, rstd), optional(offset), 1, "none");
}

// What the backward pass gives of x, the gate, the shift, w and b; undefined where it was not wanted.
using Gradients = std::array<Tensor, 5>;
enum Input : std::size_t { X, Gate, Shift, Weight, Bias };

struct Saved {
  Tensor x, gate, weight, bias, minus_mean, rstd;
  bool of_batch;
};

template <class T>
Gradients backward(const Tensor& grad, const Saved& saved, const std::array<bool, 5>& wanted) {
  const Tensor g = saved.gate.contiguous(), w = contiguous(optional(saved.weight)), b = contiguous(optional(saved.bias));
  const Affine<T> affine{g.size(0), g.size(1), data<T>(g), nullptr, data<T>(w), data<T>(b)};
  const std::int64_t samples = affine.samples, channels = affine.channels;
  const Tensor gain = gain_of(affine, g, saved.rstd);
  EpilogueShape shape;
  const Tensor x = dense(saved.x, 1, true, shape);
  const Tensor dz = same_layout(grad, x) ? grad : at::empty_like(x).copy_(grad);

  // of the epilogue's gate, rstd S: sum dz (x - mean); of its shift: dT
  const auto [unused_u, unused_bias, dot, by_offset] =
      call_epilogue_backward(dz, x, saved.minus_mean, gain, gain, 1, "none", {false, false, true, true});
  T* by_scale = dot.mutable_data_ptr<T>();
  const T *dt = by_offset.const_data_ptr<T>(), *r = saved.rstd.const_data_ptr<T>();
  for (std::int64_t n = 0; n < samples; ++n) {
    for (std::int64_t c = 0; c < channels; ++c) by_scale[n * channels + c] *= r[c];
  }

  Gradients out;
  if (wanted[X]) {
    const Tensor slope = fresh_like(saved.rstd), constant = fresh_like(saved.rstd), dx = fresh_like(x);
    T *s = slope.mutable_data_ptr<T>(), *k = constant.mutable_data_ptr<T>();
    for (std::int64_t c = 0; c < channels; ++c) {
      double of_scale = 0, of_offset = 0;
      for (std::int64_t n = 0; saved.of_batch && n < samples; ++n) {
        const double scale = affine.scale(n, c);
        of_scale += scale * by_scale[n * channels + c];
        of_offset += scale * dt[n * channels + c];
      }
      const double part = -double(r[c]) * double(channels) / double(x.numel());
      s[c] = T(of_scale * part * r[c]);
      k[c] = T(of_offset * part);
    }
    cpu::sample_norm_backward<T>(shape, dz.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                 {data<T>(gain), data<T>(saved.minus_mean), s, k}, dx.mutable_data_ptr<T>());
    out[X] = restored(dx, saved.x);
  }
  if (wanted[Weight] || wanted[Bias]) {
    const Tensor dw = fresh_like(saved.rstd), db = fresh_like(saved.rstd);
    T *to_weight = dw.mutable_data_ptr<T>(), *to_bias = db.mutable_data_ptr<T>();
    for (std::int64_t c = 0; c < channels; ++c) {
      double weight = 0, bias = 0;
      for (std::int64_t at = c; at < samples * channels; at += channels) {
        weight += double(affine.gate[at]) * by_scale[at];
        bias += double(affine.gate[at]) * dt[at];
      }
      to_weight[c] = T(weight);
      to_bias[c] = T(bias);
    }
    if (wanted[Weight]) out[Weight] = dw;
    if (wanted[Bias]) out[Bias] = db;
  }
  if (wanted[Gate]) {  // in the memory of dS, which nothing reads any more
    for (std::int64_t n = 0; n < samples; ++n) {
      for (std::int64_t c = 0; c < channels; ++c) {
        T& to_gate = by_scale[n * channels + c];
        if (affine.weight != nullptr) to_gate *= affine.weight[c];
        if (affine.bias != nullptr) to_gate += dt[n * channels + c] * affine.bias[c];
      }
    }
    out[Gate] = dot;
  }
  if (wanted[Shift]) out[Shift] = by_offset;
  return out;
}

// Kernels read and write as many numbers as x says; torch's own operator does not look at the running statistics.
void check(const Tensor& x, const Tensor& gate, const OptionalTensor& shift, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& variance, bool of_batch) {
  // read as they lie in memory, which a trace would take for constants
  TORCH_CHECK_VALUE(eager({&x, &gate, pointer(shift), pointer(weight), pointer(bias), pointer(mean), pointer(variance)}),
                    name, ": expected ordinary tensors, outside of tracing and dispatch modes");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, name, ": x has dtype ", dtype,
                   "; expected float32 or float64");
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.numel() > 0, name, ": x has shape ", x.sizes(), "; expected (N, C, ...)");
  TORCH_CHECK_VALUE(of_batch || (given(mean) && given(variance)), name, ": there are no running statistics to use");
  const auto fits = [&](const char* what, const OptionalTensor& tensor, IntArrayRef sizes) {
    if (!given(tensor)) return;
    TORCH_CHECK_VALUE(tensor->sizes() == sizes && tensor->scalar_type() == dtype && tensor->device().is_cpu(), name, ": ",
                      what, " has shape ", tensor->sizes(), " and dtype ", tensor->scalar_type(), "; expected ", sizes,
                      " and ", dtype, ", on the CPU");
  };
  fits("x", x, x.sizes());
  fits("gate", gate, x.sizes().slice(0, 2));
  fits("shift", shift, x.sizes().slice(0, 2));
  for (const auto& [what, tensor] : {std::pair{"weight", &weight}, {"bias", &bias}, {"running_mean", &mean},
                                     {"running_var", &variance}}) {
    fits(what, *tensor, x.sizes().slice(1, 1));
  }
}

struct SampleNormNode : torch::autograd::Function<SampleNormNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gate, const OptionalTensor& shift,
                        const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& minus_mean,
                        const Tensor& rstd, bool of_batch) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, gate, weight.value_or(Tensor()), bias.value_or(Tensor()), minus_mean, rstd});
    ctx->saved_data["of_batch"] = of_batch;
    ctx->saved_data["shift"] = given(shift);
    ctx->set_materialize_grads(false);
    return x.scalar_type() == at::kDouble ? mrvae::forward<double>(x, gate, shift, weight, bias, minus_mean, rstd)
                                          : mrvae::forward<float>(x, gate, shift, weight, bias, minus_mean, rstd);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(8);
    if (!grads[0].defined()) return gradients;
    refuse_tangents(name, {&grads[0]});
    const Tensor grad = incoming(name, grads[0]);
    const auto list = ctx->get_saved_variables();
    const Saved saved{list[0], list[1], list[2], list[3], list[4], list[5], ctx->saved_data["of_batch"].toBool()};
    // edges exist for the tensors that were given, in order
    const bool there[] = {true, true, ctx->saved_data["shift"].toBool(), saved.weight.defined(), saved.bias.defined()};
    std::array<bool, 5> wanted{};
    for (std::size_t i = 0, edge = 0; i < 5; ++i) wanted[i] = there[i] && ctx->needs_input_grad(edge++);
    Gradients found;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      found = saved.x.scalar_type() == at::kDouble ? mrvae::backward<double>(grad, saved, wanted)
                                                   : mrvae::backward<float>(grad, saved, wanted);
    }
    std::copy(found.begin(), found.end(), gradients.begin());
    return once_differentiable(name, std::move(gradients));
  }
};

}  // namespace

Tensor sample_batch_norm(const Tensor& x, const Tensor& gate, const OptionalTensor& shift, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_variance, bool of_batch, double momentum, double eps) {
  check(x, gate, shift, weight, bias, running_mean, running_variance, of_batch);
  refuse_tangents(name, {&x, &gate, pointer(shift), pointer(weight), pointer(bias)});
  Tensor mean, variance;
  if (of_batch) {
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(mean, variance) = at::batch_norm_update_stats(x, running_mean, running_variance, momentum);
  } else {
    mean = running_mean->contiguous();
    variance = running_variance->contiguous();
  }
  const auto [minus_mean, rstd] = x.scalar_type() == at::kDouble ? statistics<double>(mean, variance, eps)
                                                                  : statistics<float>(mean, variance, eps);
  return SampleNormNode::apply(x, gate, shift, weight, bias, minus_mean, rstd, of_batch);
}

}  // namespace mrvae
