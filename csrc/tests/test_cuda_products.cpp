// The fused products' kernels against plain loops in double, in the shim: no GPU.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "products.h"
#include "storage.h"

namespace {

using namespace mrvae;
using namespace mrvae::cuda;
using tests::check;

std::mt19937 generator(1);

// Multiples of 1/4 up to 1: exact in every type, and so are their products and sums of those.
float quarter() { return float(int(generator() % 9) - 4) / 4; }

enum class Layout { First, Last, Sliced };

// (n, c, h, w) with a margin of NaN before and after it, so that what is read beyond it shows.
template <class T>
struct Array {
  static constexpr std::int64_t margin = 64;
  int n, c, h, w;
  View view;
  std::vector<T> numbers;

  Array(int n_, int c_, int h_, int w_, Layout layout) : n(n_), c(c_), h(h_), w(w_) {
    const std::int64_t gap = layout == Layout::Sliced ? 2 : 1;
    if (layout == Layout::Last) {
      view.c = 1, view.w = c, view.h = std::int64_t(w) * c, view.n = view.h * h;
    } else {
      view.w = gap, view.h = gap * w * gap, view.c = view.h * h, view.n = view.c * c + (gap - 1);
    }
    numbers.resize(std::size_t(view.n * n + 2 * margin + gap));
    for (T& number : numbers) store(number, std::numeric_limits<float>::quiet_NaN());
    view.data = numbers.data() + margin;
  }
  T& at(int i, int k, int y, int x) {
    return numbers[std::size_t(margin + i * view.n + k * view.c + y * view.h + x * view.w)];
  }
  template <class F>
  void fill(const F& value) {
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < c; ++k) {
        for (int y = 0; y < h; ++y) {
          for (int x = 0; x < w; ++x) store(at(i, k, y, x), float(value(i, k, y, x)));
        }
      }
    }
  }
  double get(int i, int k, int y, int x) { return load(at(i, k, y, x)); }
  // Whether nothing was written before or after it.
  bool kept_to_itself() const {
    bool clean = true;
    for (std::size_t i = 0; i < std::size_t(margin); ++i) {
      clean = clean && std::isnan(load(numbers[i])) && std::isnan(load(numbers[numbers.size() - 1 - i]));
    }
    return clean;
  }
};

struct Case {
  const char* name;
  int samples, groups, channels, columns;  // of the layer, a group
  Pair in, kernel, stride, padding, dilation, extra;
  bool transposed;
  Layout x, y, weight;
  Activation activation;
  int processors;
};

template <class T>
constexpr Parameter type_of = std::is_same_v<T, BFloat16> ? Parameter::BFloat16
                              : std::is_same_v<T, Half>   ? Parameter::Half
                                                          : Parameter::Float;

double tolerance_of(Numbers numbers) {
  return numbers == Numbers::BFloat16 ? 8e-3 : numbers == Numbers::Float ? 1e-5 : 1e-3;
}

double slope(double y, double z, Activation activation) {
  switch (activation) {
    case Activation::Relu: return z > 0;
    case Activation::LeakyRelu: return z > 0 ? 1 : leaky_relu_slope;
    case Activation::Tanh: return 1 - y * y;
    case Activation::Silu: return activation_slope<Activation::Silu>(z);
    case Activation::Gelu: return activation_slope<Activation::Gelu>(z);
    case Activation::Elu: return z > 0 ? 1 : y + 1;
    default: return 1;
  }
}

double active(double z, Activation activation) {
  switch (activation) {
    case Activation::Relu: return z > 0 ? z : 0;
    case Activation::LeakyRelu: return z > 0 ? z : leaky_relu_slope * z;
    case Activation::Tanh: return std::tanh(z);
    case Activation::Silu: return z / (1 + std::exp(-z));
    case Activation::Gelu: return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    case Activation::Elu: return z > 0 ? z : std::expm1(z);
    default: return z;
  }
}

// Calls f(n, group, i, o, h, w, p, q, r, s) for each product x[n, i, h, w] weight[.., r, s] that y[n, o, p, q] adds up.
template <class F>
void each_product(const Case& c, Pair out, const F& f) {
  const Pair small = c.transposed ? c.in : out, big = c.transposed ? out : c.in;
  for (int n = 0; n < c.samples; ++n)
    for (int a = 0; a < small.h; ++a)
      for (int b = 0; b < small.w; ++b)
        for (int r = 0; r < c.kernel.h; ++r)
          for (int s = 0; s < c.kernel.w; ++s) {
            const int h = a * c.stride.h - c.padding.h + r * c.dilation.h;
            const int w = b * c.stride.w - c.padding.w + s * c.dilation.w;
            if (h < 0 || h >= big.h || w < 0 || w >= big.w) continue;
            for (int g = 0; g < c.groups; ++g)
              for (int i = 0; i < c.channels; ++i)
                for (int o = 0; o < c.columns; ++o) {
                  if (c.transposed) {
                    f(n, g, i, o, a, b, h, w, r, s);
                  } else {
                    f(n, g, i, o, h, w, a, b, r, s);
                  }
                }
          }
}

template <class T>
void run(const Case& c, Numbers numbers, bool per_sample) {
  const auto size = [&](int in, int kernel, int stride, int padding, int dilation, int extra) {
    return c.transposed ? (in - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
                        : (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  const Pair out = {size(c.in.h, c.kernel.h, c.stride.h, c.padding.h, c.dilation.h, c.extra.h),
                    size(c.in.w, c.kernel.w, c.stride.w, c.padding.w, c.dilation.w, c.extra.w)};
  const int inputs = c.groups * c.channels, outputs = c.groups * c.columns;
  Array<T> x(c.samples, inputs, c.in.h, c.in.w, c.x), y(c.samples, outputs, out.h, out.w, c.y);
  const Layout other = c.y == Layout::First ? Layout::Last : c.y;  // strides of their own for dy and for what is saved
  Array<T> kept(c.samples, outputs, out.h, out.w, c.y), dy(c.samples, outputs, out.h, out.w, other);
  Array<T> dx(c.samples, inputs, c.in.h, c.in.w, c.x);
  // (O, I / groups, R, S), transposed (I, O / groups, R, S)
  const int rows = c.transposed ? inputs : outputs, columns = c.transposed ? c.columns : c.channels;
  Array<T> weight(rows, columns, c.kernel.h, c.kernel.w, c.weight), dw(rows, columns, c.kernel.h, c.kernel.w, c.weight);
  const auto any = [](int, int, int, int) { return quarter(); };
  x.fill(any), weight.fill(any), dy.fill(any);
  const int gate_rows = per_sample ? c.samples : 1;
  std::vector<float> bias(std::size_t(outputs), 0.f), gate(std::size_t(gate_rows * outputs)), shift(gate.size());
  for (float& value : bias) value = quarter();
  for (float& value : gate) value = 0.5f + quarter() / 4;
  for (float& value : shift) value = quarter();
  const auto weight_at = [&](Array<T>& w, int g, int i, int o, int r, int s) -> T& {
    return c.transposed ? w.at(g * c.channels + i, o, r, s) : w.at(g * c.columns + o, i, r, s);
  };
  const bool argument = c.activation == Activation::Silu || c.activation == Activation::Gelu;
  const std::string name = std::string(c.name) + (per_sample ? ", gate a sample, numbers " : ", numbers ") +
                           std::to_string(int(numbers));
  const auto where = [&](const char* what) { return name + ", " + what; };

  // forward
  Convolution forward{};
  forward.numbers = numbers, forward.transposed = c.transposed;
  forward.samples = c.samples, forward.groups = c.groups, forward.channels = c.channels, forward.columns = c.columns;
  forward.in = c.in, forward.out = out, forward.kernel = c.kernel, forward.stride = c.stride;
  forward.padding = c.padding, forward.dilation = c.dilation;
  forward.x = x.view, forward.y = y.view;
  forward.weight = weight.view;
  if (c.transposed) std::swap(forward.weight.n, forward.weight.c);
  forward.weight_group = weight.view.n * (c.transposed ? c.channels : c.columns);
  const bool keeps = per_sample || argument;
  if (keeps) forward.kept = kept.view;
  forward.bias = bias.data(), forward.gate = gate.data(), forward.shift = shift.data();
  forward.per_sample = forward.keep_product = per_sample, forward.rows_per_gate = 1, forward.activation = c.activation;
  convolve(forward, c.processors, nullptr);

  Array<double> u(c.samples, outputs, out.h, out.w, Layout::First);
  u.fill([](int, int, int, int) { return 0.0; });
  each_product(c, out, [&](int n, int g, int i, int o, int h, int w, int p, int q, int r, int s) {
    u.at(n, g * c.columns + o, p, q) +=
        x.get(n, g * c.channels + i, h, w) * load(weight_at(weight, g, i, o, r, s));
  });
  Array<double> slopes(c.samples, outputs, out.h, out.w, Layout::First);
  std::vector<double> sum_s(std::size_t(outputs), 0.0), expected_gate(std::size_t(outputs), 0.0);
  const double tolerance = tolerance_of(numbers);
  const auto close = [&](const char* what, double at, double value, double expected, double scale) {
    if (!(std::fabs(value - expected) <= tolerance * std::fmax(scale, std::fabs(expected)))) {
      check(false, where(what).c_str(), at, value, expected);
    }
  };
  double index = 0;
  for (int n = 0; n < c.samples; ++n)
    for (int o = 0; o < outputs; ++o)
      for (int p = 0; p < out.h; ++p)
        for (int q = 0; q < out.w; ++q, ++index) {
          const std::size_t of = std::size_t(per_sample ? n * outputs + o : o);
          const double value = u.at(n, o, p, q), z = double(gate[of]) * (value + bias[std::size_t(o)]) + shift[of];
          const double result = active(z, c.activation);
          close("y", index, y.get(n, o, p, q), result, 1 + std::fabs(value));
          if (keeps) close("kept", index, kept.get(n, o, p, q), per_sample ? value : z, 1 + std::fabs(value));
          // backward from what memory holds
          const double before = argument ? kept.get(n, o, p, q) : z;
          slopes.at(n, o, p, q) = per_sample ? 1 : slope(y.get(n, o, p, q), before, c.activation);
          const double s = slopes.at(n, o, p, q) * dy.get(n, o, p, q);
          sum_s[std::size_t(o)] += s;
          expected_gate[std::size_t(o)] += s * (value + bias[std::size_t(o)]);
        }

  // dx; with a gate a sample dy stands for du
  Convolution input{};
  input.numbers = numbers, input.transposed = !c.transposed;
  input.samples = c.samples, input.groups = c.groups, input.channels = c.columns, input.columns = c.channels;
  input.in = out, input.out = c.in, input.kernel = c.kernel, input.stride = c.stride;
  input.padding = c.padding, input.dilation = c.dilation;
  input.x = dy.view, input.y = dx.view;
  input.weight = weight.view;
  if (!c.transposed) std::swap(input.weight.n, input.weight.c);
  input.weight_group = forward.weight_group;
  if (!per_sample) {
    input.prologue_gate = gate.data(), input.activation = c.activation;
    if (c.activation != Activation::None) input.saved = argument ? kept.view : y.view;
  }
  convolve(input, c.processors, nullptr);
  Array<double> expected(c.samples, inputs, c.in.h, c.in.w, Layout::First);
  Array<double> expected_weight(rows, columns, c.kernel.h, c.kernel.w, Layout::First);
  expected.fill([](int, int, int, int) { return 0.0; });
  expected_weight.fill([](int, int, int, int) { return 0.0; });
  each_product(c, out, [&](int n, int g, int i, int o, int h, int w, int p, int q, int r, int s) {
    const int channel = g * c.columns + o;
    const double ds = slopes.at(n, channel, p, q) * dy.get(n, channel, p, q);
    const double own = per_sample ? 1 : gate[std::size_t(channel)];
    expected.at(n, g * c.channels + i, h, w) += own * ds * load(weight_at(weight, g, i, o, r, s));
    double& target = c.transposed ? expected_weight.at(g * c.channels + i, o, r, s)
                                  : expected_weight.at(channel, i, r, s);
    target += own * ds * x.get(n, g * c.channels + i, h, w);
  });
  index = 0;
  for (int n = 0; n < c.samples; ++n)
    for (int i = 0; i < inputs; ++i)
      for (int h = 0; h < c.in.h; ++h)
        for (int w = 0; w < c.in.w; ++w, ++index) {
          close("dx", index, dx.get(n, i, h, w), expected.at(n, i, h, w), 4);
        }

  // dW, db, dg, dt
  WeightGradient gradient{};
  gradient.numbers = numbers, gradient.slope_of_a = !c.transposed;
  gradient.samples = c.samples, gradient.groups = c.groups;
  gradient.a_channels = c.transposed ? c.channels : c.columns, gradient.b_channels = columns;
  gradient.a_size = c.transposed ? c.in : out, gradient.b_size = c.transposed ? out : c.in;
  gradient.kernel = c.kernel, gradient.stride = c.stride, gradient.padding = c.padding, gradient.dilation = c.dilation;
  gradient.a = c.transposed ? x.view : dy.view, gradient.b = c.transposed ? dy.view : x.view;
  gradient.saved = input.saved, gradient.activation = input.activation;
  plan_parts(gradient, c.processors);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> parts(std::size_t(gradient.splits) * std::size_t(rows * columns * c.kernel.h * c.kernel.w), nan);
  std::vector<float> sums(std::size_t(gradient.splits * outputs), nan);
  gradient.parts = parts.data();
  Finish last{};
  if (!c.transposed) gradient.sums = sums.data();
  weight_gradient(gradient, c.processors, nullptr);
  last.splits = last.sum_splits = gradient.splits;
  if (c.transposed) {
    ChannelSums all{};
    all.type = type_of<T>;
    all.samples = c.samples, all.channels = outputs, all.size = out, all.grad = dy.view, all.saved = input.saved;
    all.activation = input.activation, all.splits = sum_splits(all, c.processors);
    sums.assign(std::size_t(all.splits * outputs), nan);
    all.parts = sums.data(), last.sum_splits = all.splits;
    channel_sums(all, nullptr);
  }
  std::vector<float> db(std::size_t(outputs), nan), dg(db), dt(db);
  last.parts = parts.data(), last.sums = sums.data(), last.rows = rows, last.columns = columns;
  last.taps = c.kernel.h * c.kernel.w, last.groups = c.transposed ? c.groups : 0;
  last.type = type_of<T>;
  last.weight = weight.view.data, last.bias = bias.data(), last.gate = per_sample ? nullptr : gate.data();
  last.weight_row = last.grad_row = weight.view.n, last.weight_column = last.grad_column = weight.view.c;
  last.weight_r = last.grad_r = weight.view.h, last.weight_s = last.grad_s = weight.view.w;
  last.kernel_width = c.kernel.w;
  last.grad_weight = const_cast<void*>(dw.view.data), last.grad_bias = db.data();
  last.grad_gate = dg.data(), last.grad_shift = dt.data();
  finish(last, nullptr);
  index = 0;
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < columns; ++k)
      for (int r = 0; r < c.kernel.h; ++r)
        for (int s = 0; s < c.kernel.w; ++s, ++index) {
          close("dW", index, dw.get(i, k, r, s), expected_weight.at(i, k, r, s), 4);
        }
  check(y.kept_to_itself() && kept.kept_to_itself() && dx.kept_to_itself() && dw.kept_to_itself(),
        where("written beyond a tensor").c_str(), 0, 0, 0);
  for (int o = 0; o < outputs && !per_sample; ++o) {
    const double s = sum_s[std::size_t(o)], scale = 4 + std::fabs(expected_gate[std::size_t(o)]);
    close("dt", o, dt[std::size_t(o)], s, scale);
    close("db", o, db[std::size_t(o)], gate[std::size_t(o)] * s, scale);
    close("dg", o, dg[std::size_t(o)], expected_gate[std::size_t(o)], 3 * scale);
  }
}

// Of one number type, or, below 0, of all.
void run_all(const Case& c, int only) {
  const auto wanted = [&](Numbers numbers) { return only < 0 || only == int(numbers); };
  for (const bool per_sample : {false, true}) {
    if (wanted(Numbers::BFloat16)) run<BFloat16>(c, Numbers::BFloat16, per_sample);
    if (wanted(Numbers::Half) && !per_sample) run<Half>(c, Numbers::Half, per_sample);
    if (wanted(Numbers::Tf32)) run<float>(c, Numbers::Tf32, per_sample);
    if (wanted(Numbers::Float) && !per_sample) run<float>(c, Numbers::Float, per_sample);
  }
}

constexpr Pair one = {1, 1}, none = {0, 0};

Case linear(const char* name, int rows, int inner, int columns, Activation activation, int processors) {
  const Layout last = Layout::Last;
  return {name, rows, 1, inner, columns, one, one, one, none, one, none, false, last, last, last, activation,
          processors};
}

}  // namespace

// With an argument: only that number type, whose kernels are the only ones then that need to be there.
int main(int count, char** arguments) {
  const int only = count > 1 ? std::atoi(arguments[1]) : -1;
  using A = Activation;
  const auto L = Layout::Last, F = Layout::First, S = Layout::Sliced;
  // tiles of 32, 64 and 128 by the number of processors; an end in each axis; chunks of 16 bytes, and odd sizes
  const std::vector<Case> cases = {
      linear("linear, whole chunks", 40, 72, 48, A::Relu, 1000),
      linear("linear, odd", 37, 29, 33, A::Gelu, 1000),
      linear("linear, one", 1, 1, 1, A::Tanh, 1),
      linear("linear, medium", 70, 136, 72, A::None, 2),
      linear("linear, large", 130, 168, 136, A::Elu, 1),
      linear("linear, large odd", 131, 67, 129, A::Silu, 1),
      {"conv", 2, 1, 16, 24, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, none, false, L, L, L, A::Relu, 1000},
      {"conv, strided", 2, 1, 8, 40, {9, 8}, {4, 4}, {2, 2}, {1, 1}, {1, 1}, none, false, L, L, F, A::LeakyRelu, 1000},
      {"conv, first layer", 2, 1, 3, 20, {8, 9}, {3, 3}, {2, 1}, {1, 0}, {1, 2}, none, false, F, F, F, A::Silu, 1000},
      {"conv, groups", 2, 2, 16, 24, {5, 7}, {2, 3}, {2, 3}, {0, 2}, {2, 1}, none, false, F, F, L, A::Gelu, 1000},
      {"conv, sliced", 1, 1, 5, 7, {5, 4}, {2, 2}, {1, 1}, {1, 1}, {1, 1}, none, false, S, S, S, A::Tanh, 1000},
      {"conv, large", 2, 1, 16, 72, {9, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, none, false, L, L, L, A::None, 1},
      {"transposed", 2, 1, 16, 24, {4, 3}, {4, 4}, {2, 2}, {1, 1}, {1, 1}, none, true, L, L, L, A::Relu, 1000},
      {"transposed, output padding", 2, 1, 8, 16, {3, 4}, {3, 3}, {2, 3}, {1, 0}, {1, 1}, {1, 2}, true, L, L, F,
       A::Elu, 1000},
      {"transposed, common factor", 1, 1, 9, 5, {4, 4}, {3, 2}, {4, 2}, {1, 1}, {2, 2}, {1, 0}, true, F, F, F,
       A::Tanh, 1000},
      {"transposed, groups", 2, 3, 8, 16, {3, 3}, {3, 3}, {1, 2}, {1, 1}, {2, 3}, none, true, F, F, L, A::Silu, 1000},
      {"many positions", 5, 1, 8, 8, {12, 12}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, none, false, L, L, L, A::Relu, 1000},
  };
  for (const Case& c : cases) {
    try {
      run_all(c, only);
    } catch (const std::exception& error) {
      check(false, (std::string(c.name) + ": " + error.what()).c_str(), 0, 0, 0);
    }
  }
  return tests::report();
}
