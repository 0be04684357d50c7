// The CPU kernels against loops that spell out the formulas, in double.
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace mrvae;
using tests::close;

namespace {

std::vector<double> numbers(std::int64_t n, double phase) {
  std::vector<double> values(n);
  for (std::int64_t i = 0; i < n; ++i) values[i] = std::sin(phase + 0.7 * double(i) + 0.01 * double(i % 13));
  return values;
}

void gates(int degree) {
  const std::int64_t samples = 3, size = 300, total = 2 * size;
  const auto w = numbers(degree * total, 1), c = numbers(total, 2), eta = numbers(samples, 3);
  std::vector<double> first(samples * size), second(samples * size), dw(degree * total), dc(total), deta(samples);
  const GateParameters<const double> with{w.data(), c.data(), total, degree};
  cpu::gates_forward<double>({{0, size, Gate::Sigmoid, first.data()}, {size, size, Gate::Identity, second.data()}}, with,
                             eta.data(), samples);
  auto grad = numbers(samples * size, 4);
  cpu::gates_backward<double>({{0, size, Gate::Sigmoid, grad.data()}, {size, size, Gate::Identity, nullptr}}, with,
                              eta.data(), samples, {dw.data(), dc.data(), total, degree}, deta.data());
  std::vector<double> want_eta(samples);
  for (std::int64_t i = 0; i < size; ++i) {
    double want_w[gate_degrees] = {}, want_c = 0;
    for (std::int64_t n = 0; n < samples; ++n) {
      const double e = eta[n], basis[] = {e, e * e - 1, e * e * e - 1.8 * e}, turned[] = {1, 2 * e, 3 * e * e - 1.8};
      double p = c[i], q = c[size + i], slope = 0;
      for (int k = 0; k < degree; ++k) {
        p += w[k * total + i] * basis[k];
        q += w[k * total + size + i] * basis[k];
        slope += w[k * total + i] * turned[k];
      }
      const double g = 1 / (1 + std::exp(-p)), dp = grad[n * size + i] * g * (1 - g);
      close("sigmoid", double(i), first[n * size + i], g, 1e-15);
      close("identity", double(i), second[n * size + i], q, 2e-15);
      for (int k = 0; k < degree; ++k) want_w[k] += dp * basis[k];
      want_c += dp;
      want_eta[n] += dp * slope;
    }
    for (int k = 0; k < degree; ++k) {
      close("dw", double(i), dw[k * total + i], want_w[k], 1e-13);
      close("dw of an unused gate", double(i), dw[k * total + size + i], 0, 0);
    }
    close("dc", double(i), dc[i], want_c, 1e-13);
  }
  for (std::int64_t n = 0; n < samples; ++n) close("deta", double(n), deta[n], want_eta[n], 1e-12);
}

void epilogue(const EpilogueShape& s) {
  const std::int64_t gates = s.samples * s.channels, total = gates * s.rows * s.inner;
  const auto u = numbers(total, 1), g = numbers(gates, 2), b = numbers(s.channels, 3), t = numbers(gates, 4);
  const auto dy = numbers(total, 5);
  std::vector<double> y(total), du(total), dg(gates), dt(gates), db(s.channels);
  const EpilogueParameters<double> with{g.data(), b.data(), t.data(), Activation::LeakyRelu};
  cpu::epilogue_forward(Storage::Double, s, u.data(), with, y.data());
  cpu::epilogue_backward(Storage::Double, s, dy.data(), u.data(), with, {du.data(), dg.data(), dt.data(), db.data()});
  std::vector<double> want_g(gates), want_t(gates), want_b(s.channels);
  for (std::int64_t k = 0; k < total; ++k) {
    const std::int64_t c = k / s.inner % s.channels, p = k / (s.inner * s.channels * s.rows) * s.channels + c;
    const double z = g[p] * (u[k] + b[c]) + t[p], dz = dy[k] * (z > 0 ? 1 : 0.01);
    close("y", double(k), y[k], z > 0 ? z : 0.01 * z, 1e-15);
    close("du", double(k), du[k], g[p] * dz, 1e-15);
    want_g[p] += dz * (u[k] + b[c]);
    want_t[p] += dz;
    want_b[c] += g[p] * dz;
  }
  for (std::int64_t p = 0; p < gates; ++p) close("dg", double(p), dg[p], want_g[p], 1e-12);
  for (std::int64_t p = 0; p < gates; ++p) close("dt", double(p), dt[p], want_t[p], 1e-12);
  for (std::int64_t c = 0; c < s.channels; ++c) close("db", double(c), db[c], want_b[c], 1e-12);
}

void fold(std::int64_t groups, std::int64_t outer, std::int64_t channels, std::int64_t inner) {
  const std::int64_t outputs = groups * channels, total = outputs * outer * inner;
  const auto w = numbers(total, 1), g = numbers(outputs, 2), b = numbers(outputs, 3), db_folded = numbers(outputs, 4);
  auto grad = numbers(total, 5);
  const auto dw_folded = grad;
  std::vector<double> folded(total), folded_bias(outputs), dg(outputs), db(outputs);
  FoldLayer layer{};
  layer.storage = Storage::Double;
  layer.groups = groups, layer.outer = outer, layer.channels = channels, layer.inner = inner;
  layer.weight = w.data(), layer.gate = g.data(), layer.bias = b.data();
  layer.folded = folded.data(), layer.folded_bias = folded_bias.data();
  layer.grad = grad.data(), layer.grad_bias = db_folded.data();
  layer.grad_weight = grad.data();  // in place
  layer.grad_gate = dg.data(), layer.grad_layer_bias = db.data();
  cpu::fold_forward({layer});
  cpu::fold_backward({layer});
  std::vector<double> want(outputs);
  for (std::int64_t k = 0; k < total; ++k) {
    const std::int64_t c = k / (inner * channels * outer) * channels + k / inner % channels;
    close("W'", double(k), folded[k], g[c] * w[k], 1e-15);
    close("dW", double(k), grad[k], g[c] * dw_folded[k], 1e-15);
    want[c] += dw_folded[k] * w[k];
  }
  for (std::int64_t c = 0; c < outputs; ++c) {
    close("b'", double(c), folded_bias[c], g[c] * b[c], 1e-15);
    close("db", double(c), db[c], g[c] * db_folded[c], 1e-15);
    close("dg of a fold", double(c), dg[c], want[c] + db_folded[c] * b[c], 1e-12);
  }
}

}  // namespace

int main() {
  for (const int degree : {1, 2, 3}) gates(degree);
  for (const EpilogueShape& shape : {EpilogueShape{1, 70, 3, 1}, {1, 4, 5, 100}, {5, 1, 7, 1}, {3, 2, 4, 20},
                                          {1, 900, 40, 1}, {2, 3, 5, 7}, {1, 0, 4, 1}, {1, 3, 2, 1500}}) {
    epilogue(shape);
  }
  fold(1, 1, 7, 100);
  fold(1, 1, 9, 9);
  fold(1, 600, 5, 6);
  fold(3, 4, 5, 80);
  fold(2, 3, 4, 1);
  return tests::report();
}
