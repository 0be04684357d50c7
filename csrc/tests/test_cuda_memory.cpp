// The gates', fold's and epilogue's CUDA kernels in the shim, against loops in double. MRVAE_PART leaves only one of
// them: 1 gates, 2 fold, 3 epilogue.
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"
#include "storage.h"

#ifndef MRVAE_PART
#define MRVAE_PART 0
#endif

using namespace mrvae;
using tests::check;

namespace {

[[maybe_unused]] double number(std::int64_t i, double phase) {
  return std::sin(phase + 0.7 * double(i) + 0.01 * double(i % 13));
}

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
constexpr Storage storage_name = std::is_same_v<S, float>      ? Storage::Float
                                 : std::is_same_v<S, double>   ? Storage::Double
                                 : std::is_same_v<S, BFloat16> ? Storage::BFloat16
                                                               : Storage::Half;

// One rounding to S, and one sum of many numbers in Compute<S>
template <class S>
constexpr double rounding = std::is_same_v<S, double>  ? 1e-14
                            : std::is_same_v<S, float> ? 2e-6
                            : std::is_same_v<S, Half>  ? 1e-3
                                                       : 8e-3;
template <class S>
constexpr double summation = std::is_same_v<S, double> ? 1e-13 : 1e-5;

// Numbers `offset` elements after an address that is a multiple of 64, with NaN on both sides, which must stay there
// and shows in what is computed from it.
template <class S>
class Array {
 public:
  explicit Array(std::int64_t n, int offset = 0) : n_(n), memory_(std::size_t(n + 2 * margin + 64)) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    start_ = memory_.data() + (64 - address % 64) % 64 / sizeof(S) + margin + offset;
    for (S& value : memory_) store(value, std::numeric_limits<Compute<S>>::quiet_NaN());
  }
  Array(std::int64_t n, double phase, int offset) : Array(n, offset) {
    for (std::int64_t i = 0; i < n; ++i) store(start_[i], Compute<S>(number(i, phase)));
  }
  S* data() { return n_ > 0 ? start_ : nullptr; }  // as an empty tensor's
  double operator[](std::int64_t i) const { return double(load(start_[i])); }
  void set(std::int64_t i, double value) { store(start_[i], Compute<S>(value)); }
  void intact(const char* what) const {
    for (const S* p = memory_.data(); p != memory_.data() + memory_.size(); ++p) {
      if (p >= start_ && p < start_ + n_) continue;
      check(std::isnan(double(load(*p))), what, double(p - start_), double(load(*p)), 0);
    }
  }

 private:
  static constexpr int margin = 64;
  std::int64_t n_;
  std::vector<S> memory_;
  S* start_;
};

// Scratch as it is: filled with NaN, and not a byte more.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : numbers_((bytes + 3) / 4, 0) {}
  void* data() { return numbers_.data(); }
  void intact(const char* what) const { numbers_.intact(what); }

 private:
  Array<float> numbers_;
};

void near(const char* what, std::int64_t at, double value, double expected, double tolerance, double scale = 1) {
  check(std::fabs(value - expected) <= tolerance * std::fmax(1.0, scale), what, double(at), value, expected);
}

// ---- gates --------------------------------------------------------------------------------------------------------

#if MRVAE_PART == 0 || MRVAE_PART == 1

double gate(Gate kind, double p) {
  switch (kind) {
    case Gate::Sigmoid: return 1 / (1 + std::exp(-p));
    case Gate::Sqrt: return p < 0 ? std::sqrt(-std::expm1(p)) : 0;
    case Gate::Softplus: return std::log1p(std::exp(p));
    default: return p;
  }
}

double slope(Gate kind, double p) {
  switch (kind) {
    case Gate::Sigmoid: return gate(kind, p) * (1 - gate(kind, p));
    case Gate::Sqrt: return p < 0 ? -0.5 * std::exp(p) / std::fmax(gate(kind, p), sqrt_gate_floor) : 0;
    case Gate::Softplus: return gate(Gate::Sigmoid, p);
    default: return 1;
  }
}

template <class T>
void gates(const std::vector<std::int64_t>& sizes, std::int64_t samples, int offset, bool want_eta, int degree = 1) {
  std::int64_t total = 0;
  for (const auto size : sizes) total += size;
  Array<T> w(degree * total, 1.0, offset), c(total, 2.0, offset), eta(samples, 3.0, 0), dw(degree * total, offset);
  Array<T> dc(total, offset), deta(samples);
  std::vector<Array<T>> values, grads;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    values.emplace_back(samples * sizes[i], offset);
    grads.emplace_back(samples * sizes[i], 4.0 + double(i), offset);
  }
  std::vector<GateSlice<T>> forward, backward;
  std::int64_t at = 0;
  const auto unused = [&](std::size_t i) { return i % 4 == 2; };
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const Gate kind = Gate((i + 1) % 4);
    forward.push_back({at, sizes[i], kind, values[i].data()});
    backward.push_back({at, sizes[i], kind, unused(i) ? nullptr : grads[i].data()});
    at += sizes[i];
  }
  const GateParameters<const T> parameters{w.data(), c.data(), total, degree};
  const GateParameters<T> gradients{dw.data(), dc.data(), total, degree};
  cuda::gates_forward<T>(forward, parameters, eta.data(), samples, nullptr);
  Scratch scratch(cuda::gates_backward_scratch(backward, samples, degree, want_eta));
  cuda::gates_backward<T>(backward, parameters, eta.data(), samples, gradients, want_eta ? deta.data() : nullptr,
                          scratch.data(), nullptr);
  std::vector<double> want_deta(samples), scale(samples);
  at = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const Gate kind = forward[i].kind;
    for (std::int64_t k = 0; k < sizes[i]; ++k) {
      double want_w[gate_degrees] = {}, want_c = 0;
      for (std::int64_t n = 0; n < samples; ++n) {
        const double e = eta[n], basis[] = {e, e * e - 1, e * e * e - 1.8 * e}, turned[] = {1, 2 * e, 3 * e * e - 1.8};
        double p = c[at + k], slope_of_p = 0, size = std::fabs(p);
        for (int d = 0; d < degree; ++d) {
          p += w[d * total + at + k] * basis[d];
          slope_of_p += w[d * total + at + k] * turned[d];
          size += std::fabs(w[d * total + at + k] * basis[d]);
        }
        // terms that cancel, and the sqrt gate, whose slope is 1 / (2 g) as it closes
        const double g = gate(kind, p), steep = kind == Gate::Sqrt ? 1 / std::fmax(2 * g, 1e-3) : 1;
        near("gate", k, values[i][n * sizes[i] + k], g, rounding<T>, degree == 1 ? 1 : size * steep);
        const double dp = unused(i) ? 0 : grads[i][n * sizes[i] + k] * slope(kind, p);
        for (int d = 0; d < degree; ++d) want_w[d] += dp * basis[d];
        want_c += dp;
        want_deta[n] += dp * slope_of_p;
        scale[n] += std::fabs(dp) * (degree == 1 ? 1 : 4);
      }
      for (int d = 0; d < degree; ++d) near("dw", k, dw[d * total + at + k], want_w[d], summation<T>, double(samples));
      near("dc", k, dc[at + k], want_c, summation<T>, double(samples));
    }
    at += sizes[i];
  }
  for (std::int64_t n = 0; n < samples && want_eta; ++n) near("deta", n, deta[n], want_deta[n], summation<T>, scale[n]);
  for (const auto& v : values) v.intact("beyond the gates");
  dw.intact("beyond dw"), dc.intact("beyond dc"), deta.intact("beyond deta"), scratch.intact("beyond scratch");
}

template <class T>
void all_gates() {
  for (const std::int64_t samples : {1, 2, 7, 33, 300}) {
    for (const int offset : {0, 1}) {
      for (const int degree : {1, 2, 3}) {
        gates<T>({128, 1, 31, 0, 132, 64}, samples, offset, true, degree);
        gates<T>({128, 64}, samples, offset, false, degree);
        gates<T>({64, 5}, samples, offset, true, degree);
      }
      gates<T>({13}, samples, offset, samples % 2 == 0);
    }
  }
  gates<T>({}, 3, 0, true);
  gates<T>({0, 0}, 3, 0, true);
  gates<T>({5, 8}, 0, 0, true);
  std::vector<std::int64_t> many;
  for (int i = 0; i < 131; ++i) many.push_back(i % 11 * 4);
  gates<T>(many, 1, 0, true);
  many.resize(67);
  gates<T>(many, 259, 0, true);
  gates<T>(many, 259, 0, true, gate_degrees);
}

#endif

// ---- fold ---------------------------------------------------------------------------------------------------------

#if MRVAE_PART == 0 || MRVAE_PART == 2

enum Missing { Nothing, Bias, Shift, GradWeight, GradBias, WantWeight, WantGate, WantVectors, missing_count };

template <class S>
struct Fold {
  using T = Compute<S>;
  std::int64_t groups, outer, channels, inner, outputs = groups * channels, total = outputs * outer * inner;
  Missing missing;
  Array<S> w, folded, grad, original;
  Array<T> g, b, t, db_folded, folded_bias, dg, db, dt;

  Fold(const EpilogueShape& s, int offset, Missing what)
      : groups(s.samples), outer(s.rows), channels(s.channels), inner(s.inner), missing(what), w(total, 1.0, offset),
        folded(total, offset), grad(total, 5.0, offset), original(grad), g(outputs, 2.0, offset), b(outputs, 3.0, 0),
        t(outputs, 4.0, 0), db_folded(outputs, 6.0, 0), folded_bias(outputs), dg(outputs), db(outputs), dt(outputs) {
    original = Array<S>(total, 5.0, offset);
  }
  Fold(const Fold&) = delete;

  bool has(Missing what) const { return missing != what; }

  FoldLayer layer() {
    FoldLayer l{};
    l.storage = storage_name<S>;
    l.groups = groups, l.outer = outer, l.channels = channels, l.inner = inner;
    l.weight = w.data(), l.gate = g.data(), l.bias = has(Bias) ? b.data() : nullptr;
    l.shift = has(Shift) ? t.data() : nullptr;
    l.folded = folded.data(), l.folded_bias = folded_bias.data();
    l.grad = has(GradWeight) ? grad.data() : nullptr, l.grad_bias = has(GradBias) ? db_folded.data() : nullptr;
    l.grad_weight = has(WantWeight) ? grad.data() : nullptr;  // in place
    l.grad_gate = has(WantGate) ? dg.data() : nullptr;
    l.grad_layer_bias = has(Bias) && has(WantVectors) ? db.data() : nullptr;
    l.grad_shift = has(WantVectors) ? dt.data() : nullptr;
    return l;
  }

  void verify() const {
    std::vector<double> want(outputs), scale(outputs);
    for (std::int64_t k = 0; k < total; ++k) {
      const std::int64_t c = k / (inner * channels * outer) * channels + k / inner % channels;
      near("W'", k, folded[k], g[c] * w[k], rounding<S>);
      const double d = has(GradWeight) ? original[k] : 0;
      near("dW", k, grad[k], has(WantWeight) ? g[c] * d : d, rounding<S>);
      want[c] += d * w[k];
      scale[c] += std::fabs(d * w[k]);
    }
    for (std::int64_t c = 0; c < outputs; ++c) {
      const double bias = has(Bias) ? b[c] : 0, d = has(GradBias) ? db_folded[c] : 0;
      near("b'", c, folded_bias[c], g[c] * bias + (has(Shift) ? t[c] : 0), rounding<T>);
      if (has(WantGate)) near("dg", c, dg[c], want[c] + d * bias, summation<S>, scale[c]);
      if (has(Bias) && has(WantVectors)) near("db", c, db[c], g[c] * d, rounding<T>);
      if (has(WantVectors)) near("dt", c, dt[c], d, rounding<T>);
    }
    folded.intact("beyond W'"), grad.intact("beyond dW"), folded_bias.intact("beyond b'"), dg.intact("beyond dg");
    db.intact("beyond db"), dt.intact("beyond dt");
  }
};

template <class S>
void fold(const std::vector<EpilogueShape>& shapes, int offset, Missing missing) {
  std::vector<std::unique_ptr<Fold<S>>> folds;
  std::vector<FoldLayer> layers;
  for (const auto& shape : shapes) {
    folds.push_back(std::make_unique<Fold<S>>(shape, offset, missing));
    layers.push_back(folds.back()->layer());
  }
  cuda::fold_forward(layers, nullptr);
  Scratch scratch(cuda::fold_backward_scratch(layers));
  cuda::fold_backward(layers, scratch.data(), nullptr);
  for (const auto& each : folds) each->verify();
  scratch.intact("beyond scratch");
}

template <class S>
void all_folds() {
  const std::vector<EpilogueShape> shapes{{1, 1, 7, 100}, {1, 1, 9, 9},    {1, 600, 5, 6},  {3, 4, 5, 80}, {2, 3, 4, 1},
                                          {1, 1, 1, 1},   {1, 1, 3, 9001}, {1, 300, 64, 1}, {2, 16, 8, 9}, {1, 1, 5, 0},
                                          {1, 0, 4, 1},   {1, 1, 0, 3},    {1, 9, 40, 4},   {1, 1, 300, 5}};
  for (const int offset : {0, 1}) fold<S>(shapes, offset, Nothing);
  const std::vector<EpilogueShape> few{shapes[0], shapes[2], shapes[4], shapes[9]};
  for (int what = 1; what < missing_count; ++what) fold<S>(few, 0, Missing(what));
  fold<S>({}, 0, Nothing);
  std::vector<EpilogueShape> many;
  for (int i = 0; i < 70; ++i) many.push_back({1, i % 3 == 0 ? 9 : 1, 2 + i % 5, 1 + i % 7});
  fold<S>(many, 0, Nothing);
}

#endif

// ---- epilogue -----------------------------------------------------------------------------------------------------

#if MRVAE_PART == 0 || MRVAE_PART == 3

double activation(Activation kind, double z, double& slope) {
  const double s = 1 / (1 + std::exp(-z)), phi = 0.5 * std::erfc(-z * 0.70710678118654752440);
  switch (kind) {
    case Activation::Relu: return slope = z > 0, z > 0 ? z : 0;
    case Activation::Silu: return slope = s * (1 + z * (1 - s)), z * s;
    case Activation::Gelu: return slope = phi + z * std::exp(-z * z / 2) * 0.39894228040143267794, z * phi;
    case Activation::Tanh: return slope = 1 - std::tanh(z) * std::tanh(z), std::tanh(z);
    case Activation::LeakyRelu: return slope = z > 0 ? 1 : 0.01, z > 0 ? z : 0.01 * z;
    case Activation::Elu: return slope = z > 0 ? 1 : std::exp(z), z > 0 ? z : std::expm1(z);
    default: return slope = 1, z;
  }
}

struct Case {
  Activation kind = Activation::LeakyRelu;
  int offset = 0;            // elements of u, dy, du and y off alignment
  int parameter_offset = 0;  // of gate, bias, shift and their gradients
  bool bias = true, shift = true, want_u = true, want_sums = true;
};

template <class S>
void epilogue(const EpilogueShape& s, const Case& of) {
  using T = Compute<S>;
  const std::int64_t gates = s.samples * s.channels, total = gates * s.rows * s.inner;
  Array<S> u(total, 1.0, of.offset), dy(total, 5.0, of.offset), y(total, of.offset), du(total, of.offset);
  Array<T> g(gates, 2.0, of.parameter_offset), b(s.channels, 3.0, of.parameter_offset);
  Array<T> t(gates, 4.0, of.parameter_offset), dg(gates, of.parameter_offset), dt(gates, of.parameter_offset);
  Array<T> db(s.channels, of.parameter_offset);
  Array<S> in_place(total, 1.0, of.offset);
  const EpilogueParameters<T> with{g.data(), of.bias ? b.data() : nullptr, of.shift ? t.data() : nullptr, of.kind};
  const bool sums = of.want_sums;
  const EpilogueGradients<T> out{of.want_u ? du.data() : nullptr, sums ? dg.data() : nullptr,
                                 sums ? dt.data() : nullptr, sums && of.bias ? db.data() : nullptr};
  cuda::epilogue_forward(storage_name<S>, s, u.data(), with, y.data(), nullptr);
  cuda::epilogue_forward(storage_name<S>, s, in_place.data(), with, in_place.data(), nullptr);
  Scratch scratch(cuda::epilogue_backward_scratch(storage_name<S>, s, sums));
  cuda::epilogue_backward(storage_name<S>, s, dy.data(), u.data(), with, out, scratch.data(), nullptr);
  std::vector<double> want_g(gates), want_t(gates), want_b(s.channels), scale(gates), scale_b(s.channels);
  for (std::int64_t k = 0; k < total; ++k) {
    const std::int64_t c = k / s.inner % s.channels, p = k / (s.inner * s.channels * s.rows) * s.channels + c;
    const double x = u[k] + (of.bias ? b[c] : 0), z = g[p] * x + (of.shift ? t[p] : 0);
    double slope;
    near("y", k, y[k], activation(of.kind, z, slope), rounding<S>, std::fabs(z));
    check(y[k] == in_place[k], "y in place", double(k), in_place[k], y[k]);
    const double dz = dy[k] * slope;
    if (of.want_u) near("du", k, du[k], g[p] * dz, rounding<S>);
    want_g[p] += dz * x;
    want_t[p] += dz;
    want_b[c] += g[p] * dz;
    scale[p] += 2;
    scale_b[c] += 2;
  }
  for (std::int64_t p = 0; p < gates && sums; ++p) near("dg", p, dg[p], want_g[p], summation<S>, scale[p]);
  for (std::int64_t p = 0; p < gates && sums; ++p) near("dt", p, dt[p], want_t[p], summation<S>, scale[p]);
  for (std::int64_t c = 0; c < s.channels && sums && of.bias; ++c) {
    near("db", c, db[c], want_b[c], summation<S>, scale_b[c]);
  }
  y.intact("beyond y"), du.intact("beyond du"), dg.intact("beyond dg"), dt.intact("beyond dt"), db.intact("beyond db");
  in_place.intact("beyond y in place"), scratch.intact("beyond scratch");
}

template <class S>
void all_epilogues() {
  const std::vector<EpilogueShape> shapes{
      {1, 70, 3, 1},   {1, 4, 5, 100},  {5, 1, 7, 1},    {3, 2, 4, 20},    {1, 900, 40, 1}, {2, 3, 5, 7},
      {1, 0, 4, 1},    {1, 3, 2, 1500}, {1, 1, 1, 1},    {1, 257, 33, 1},  {1, 300, 256, 1}, {7, 1, 8, 1},
      {301, 1, 24, 1}, {4, 16, 8, 16},  {2, 9, 8, 3},    {1, 2, 3, 9001},  {3, 1, 5, 31},   {0, 0, 4, 1},
      {2, 1, 64, 64},  {1, 16, 3, 255}, {1, 130, 48, 4}, {2, 300, 8, 1},   {1, 1, 2, 256},  {1, 9, 0, 1},
      {1, 64, 127, 1}, {3, 37, 1, 1},   {1, 4000, 2, 1}, {300, 1, 5, 1}};
  for (const auto& shape : shapes) {
    epilogue<S>(shape, {});
    epilogue<S>(shape, {Activation::Silu, 1, 1});
    epilogue<S>(shape, {Activation::Elu, 0, 1});
  }
  for (const auto& shape : {shapes[1], shapes[2], shapes[4], shapes[11], shapes[13]}) {
    for (int kind = 0; kind < 7; ++kind) epilogue<S>(shape, {Activation(kind)});
    for (const Activation kind : {Activation::None, Activation::Tanh}) {
      epilogue<S>(shape, {kind, 0, 0, false, true});
      epilogue<S>(shape, {kind, 0, 0, true, false});
      epilogue<S>(shape, {kind, 0, 0, true, true, false});
      epilogue<S>(shape, {kind, 0, 0, true, true, true, false});
    }
  }
}

#endif

}  // namespace

int main() {
#if MRVAE_PART == 0 || MRVAE_PART == 1
  all_gates<float>();
  all_gates<double>();
#endif
#if MRVAE_PART == 0 || MRVAE_PART == 2
  all_folds<float>();
  all_folds<double>();
  all_folds<BFloat16>();
  all_folds<Half>();
#endif
#if MRVAE_PART == 0 || MRVAE_PART == 3
  all_epilogues<float>();
  all_epilogues<double>();
  all_epilogues<BFloat16>();
  all_epilogues<Half>();
#endif
  return tests::report();
}
