// From what is asked for to a kernel's arguments, and to tiles.
#pragma once

#include <numeric>

#include "convolve.cuh"
#include "weight_gradient.cuh"

namespace mrvae::cuda::plans {

inline Steps steps_of(const View& view) { return {view.n, view.c, view.h, view.w}; }

inline int ceiling(int size, int step) { return (size + step - 1) / step; }

// Whether `count` numbers along the channels are one aligned access wherever they start.
template <class T>
bool in_chunks(const View& view, int count, int samples, int channels, Pair size) {
  const auto whole = [&](std::int64_t stride, int axis) { return axis <= 1 || stride % count == 0; };
  return (view.c == 1 || count == 1) && channels % count == 0 && whole(view.n, samples) && whole(view.h, size.h) &&
         whole(view.w, size.w) && reinterpret_cast<std::uintptr_t>(view.data) % (count * sizeof(T)) == 0;
}

inline bool positions_inner(const View& view, int samples, Pair size) {
  const bool inner = (size.w > 1 && view.w == 1) || (size.h > 1 && view.h == 1) || (samples > 1 && view.n == 1);
  return view.c != 1 && inner;
}

template <class T>
Operand<T> operand(const View& view, const View& saved, int samples, int channels, Pair size) {
  constexpr int count = 16 / int(sizeof(T));
  Operand<T> result{};
  result.data = static_cast<const T*>(view.data), result.saved = static_cast<const T*>(saved.data);
  result.steps = steps_of(view), result.saved_steps = steps_of(saved);
  result.height = size.h, result.width = size.w;
  result.taps.channels = channels;
  result.wide = in_chunks<T>(view, count, samples, channels, size) &&
                (saved.data == nullptr || in_chunks<T>(saved, count, samples, channels, size));
  result.positions_inner = positions_inner(view, samples, size);
  return result;
}

// x such that number x = 1 modulo `modulus`
inline int inverse(int number, int modulus) {
  for (int x = 0; x < modulus; ++x) {
    if (std::int64_t(number) * x % modulus == 1 % modulus) return x;
  }
  return 0;
}

inline Axis axis_of(int kernel, int stride, int padding, int dilation) {
  const int common = std::gcd(stride, dilation);
  return {kernel, stride, padding, dilation, common, inverse(dilation / common, stride / common)};
}

template <class T>
ConvolveArguments<T> arguments_of(const Convolution& what) {
  constexpr int count = 16 / int(sizeof(T));
  ConvolveArguments<T> out{};
  const Pair phases = what.transposed ? what.stride : Pair{1, 1};
  const int lines = ceiling(what.out.h, phases.h), across = ceiling(what.out.w, phases.w);
  const int rows = what.samples * lines * across;

  out.x = operand<T>(what.x, what.saved, what.samples, what.channels, what.in);
  out.x.gate = what.prologue_gate;
  out.x.activation = what.activation;
  out.x.taps = {what.kernel.h, what.kernel.w, what.channels, what.dilation.h, what.dilation.w};
  out.x.positions = {Divider(std::int64_t(lines) * across), Divider(across), rows, what.stride.h, what.stride.w,
                     -what.padding.h, -what.padding.w};

  const Pair everywhere = {0x7fffffff, 0x7fffffff};
  out.weight = operand<T>(what.weight, View(), what.columns, what.channels, everywhere);
  const Pair taps = what.kernel;
  out.weight.wide = in_chunks<T>(what.weight, count, what.columns, what.channels, taps) &&
                    (what.groups == 1 || what.weight_group % count == 0);
  out.weight.positions_inner = positions_inner(what.weight, what.columns, {1, 1});
  View columns = what.weight;  // with columns as channels
  std::swap(columns.n, columns.c);
  out.weight_columns = in_chunks<T>(columns, count, what.channels, what.columns, taps) &&
                       (what.groups == 1 || what.weight_group % count == 0);
  out.weight.taps = {what.kernel.h, what.kernel.w, what.channels, 1, 1};
  out.weight.positions = {Divider(1), Divider(1), what.columns, 0, 0, 0, 0};

  out.height = axis_of(what.kernel.h, what.stride.h, what.padding.h, what.dilation.h);
  out.width = axis_of(what.kernel.w, what.stride.w, what.padding.w, what.dilation.w);
  out.transposed = what.transposed;
  if (what.transposed) {  // phase and taps: in the kernel
    out.x.positions.step_h = out.x.positions.step_w = 1;
    out.x.taps.step_h = -(what.dilation.h / out.height.common);
    out.x.taps.step_w = -(what.dilation.w / out.width.common);
  }
  out.x_group = what.channels * what.x.c, out.saved_group = what.channels * what.saved.c;
  out.weight_group = what.weight_group;

  Result<T>& to = out.to;
  to.y = static_cast<T*>(const_cast<void*>(what.y.data)), to.kept = static_cast<T*>(const_cast<void*>(what.kept.data));
  to.steps = steps_of(what.y);
  to.rows = rows, to.columns = what.columns, to.height = what.out.h, to.width = what.out.w;
  to.span = out.x.positions.span, to.across = out.x.positions.across, to.phases = phases;
  to.wide = in_chunks<T>(what.y, 4, what.samples, what.columns, what.out) &&
            (what.kept.data == nullptr || reinterpret_cast<std::uintptr_t>(what.kept.data) % (4 * sizeof(T)) == 0);
  to.positions_inner = positions_inner(what.y, what.samples, what.out);
  to.bias = what.bias, to.bias_type = what.bias_type, to.gate = what.gate, to.shift = what.shift;
  to.rows_per_gate = Divider(what.rows_per_gate);
  to.per_sample = what.per_sample, to.keep_product = what.keep_product, to.activation = what.activation;
  return out;
}

// The largest tiles of which there is one a processor; the smallest where there is none such.
enum class Size { Large, Medium, Small };

inline Size size_of(std::int64_t rows, std::int64_t columns, std::int64_t repeats, int processors) {
  const auto tiles = [&](int size) { return (rows + size - 1) / size * ((columns + size - 1) / size) * repeats; };
  if (rows > 64 && columns > 64 && tiles(128) >= processors) return Size::Large;
  if (rows > 32 && columns > 32 && 2 * tiles(64) >= processors) return Size::Medium;
  // of few columns or rows a large tile would multiply zeros
  return tiles(64) >= 4 * std::int64_t(processors) && rows > 32 && columns > 32 ? Size::Medium : Size::Small;
}

template <class Math>
void run(const Convolution& what, int processors, Stream stream) {
  const auto arguments = arguments_of<typename Math::Storage>(what);
  const std::int64_t repeats = std::int64_t(what.groups) * arguments.to.phases.h * arguments.to.phases.w;
  const Size size = size_of(arguments.to.rows, what.columns, repeats, processors);
  if (size == Size::Small) return launch_convolve<Math, Small>(arguments, what.groups, stream);
  if constexpr (!std::is_same_v<Math, Plain>) {
    if (size == Size::Large) return launch_convolve<Math, Large>(arguments, what.groups, stream);
  }
  launch_convolve<Math, Medium>(arguments, what.groups, stream);
}

template <class Math>
void run(const WeightGradient& what, int processors, Stream stream) {
  using T = typename Math::Storage;
  WeightGradientArguments<T> out{};
  const int span = what.a_size.h * what.a_size.w, positions = what.samples * span;
  const Positions at = {Divider(span), Divider(what.a_size.w), positions, 1, 1, 0, 0};
  out.a = operand<T>(what.a, what.slope_of_a ? what.saved : View(), what.samples, what.a_channels, what.a_size);
  out.a.positions = at;
  out.a.taps = {1, 1, what.a_channels, 0, 0};
  out.b = operand<T>(what.b, what.slope_of_a ? View() : what.saved, what.samples, what.b_channels, what.b_size);
  out.b.positions = at;
  out.b.positions.step_h = what.stride.h, out.b.positions.step_w = what.stride.w;
  out.b.positions.origin_h = -what.padding.h, out.b.positions.origin_w = -what.padding.w;
  out.b.taps = {what.kernel.h, what.kernel.w, what.b_channels, what.dilation.h, what.dilation.w};
  out.a.activation = out.b.activation = what.activation;
  out.a_group = what.a_channels * what.a.c, out.b_group = what.b_channels * what.b.c;
  out.a_saved_group = what.a_channels * what.saved.c, out.b_saved_group = what.b_channels * what.saved.c;
  out.parts = what.parts, out.sums = what.sums;
  out.columns = what.kernel.h * what.kernel.w * what.b_channels, out.chunk = what.chunk;
  const Size size = size_of(what.a_channels, out.columns, std::int64_t(what.groups) * what.splits, processors);
  if (size == Size::Small) return launch_weight_gradient<Math, Small>(out, what.splits, what.groups, stream);
  if constexpr (!std::is_same_v<Math, Plain>) {
    if (size == Size::Large) return launch_weight_gradient<Math, Large>(out, what.splits, what.groups, stream);
  }
  launch_weight_gradient<Math, Medium>(out, what.splits, what.groups, stream);
}

}  // namespace mrvae::cuda::plans
