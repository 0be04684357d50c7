// Gate and activation functions against the C library in long double, and derivatives against differences.
#include <algorithm>
#include <initializer_list>

#include "check.h"
#include "gate.h"

using namespace mrvae;
using tests::check;
using tests::close;

namespace {

template <class T>
constexpr double unit = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;

template <class T>
void relative(const char* what, T x, T value, long double expected, double units) {
  const double error = std::fabs(double(value - expected)), scale = std::fabs(double(expected));
  const bool tiny = scale < double(std::numeric_limits<T>::min());
  check(tiny ? error <= double(std::numeric_limits<T>::min()) : error <= units * unit<T> * scale, what, double(x),
        double(value), double(expected));
}

template <class T>
void elementary_functions() {
  const double top = sizeof(T) == 4 ? 88.0 : 709.0;
  for (double step = -1.2 * top; step <= top; step += top / 7919) {
    const T x = T(step);
    relative("exp", x, elementary::exp(x), std::exp((long double)x), 3);
    relative("expm1", x, elementary::expm1(x), std::expm1((long double)x), 4);
    relative("tanh", x, elementary::tanh(x), std::tanh((long double)x), 4);
    const T fraction = T(std::fabs(step) / (1.2 * top));
    relative("log1p", fraction, elementary::log1p(fraction), std::log1p((long double)fraction), 4);
    const T z = T(step / top * 8);
    T density;
    close("normal", double(z), double(elementary::normal_cumulative(z, density)),
          double(0.5L * std::erfc(-(long double)z / std::sqrt(2.0L))), 2 * unit<T>);
    close("density", double(z), double(density), double(std::exp(-0.5L * z * z)), 2 * unit<T>);
  }
  for (double x = 1e-30; x < 1; x *= 3) {
    relative("expm1 near 0", T(-x), elementary::expm1(T(-x)), std::expm1((long double)T(-x)), 4);
    relative("log1p near 0", T(x), elementary::log1p(T(x)), std::log1p((long double)T(x)), 4);
  }
}

template <Gate kind>
void gate(const char* name) {
  for (double p = -30; p < 30; p += 0.0371) {
    const double h = 1e-6;
    const bool clipped = kind == Gate::Sqrt && p > -0.01 && p < 0.01;  // near 0 the slope is bounded on purpose
    if (clipped) continue;
    const double slope = (gate_value<kind>(p + h) - gate_value<kind>(p - h)) / (2 * h);
    close(name, p, gate_slope<kind>(p), slope, 1e-8);
    close(name, p, double(gate_value<kind>(float(p))), gate_value<kind>(double(float(p))), 1e-6);
    close(name, p, double(gate_slope<kind>(float(p))), gate_slope<kind>(double(float(p))), 1e-6);
  }
  const float extreme[] = {0.0f, 1e-38f, 88.0f, 90.0f, 710.0f, 1e30f, std::numeric_limits<float>::max(),
                           std::numeric_limits<float>::infinity()};
  for (const float magnitude : extreme) {
    for (const float p : {magnitude, -magnitude}) {
      check(std::isfinite(gate_value<kind>(p)) && std::isfinite(gate_slope<kind>(p)), name, p, gate_value<kind>(p), 0);
    }
  }
}

// A nearly closed gate and a nearly flat one keep their digits; a NaN stays one.
void small_gates() {
  for (double x = 1e-30; x < 80; x *= 3) {
    const long double p = -(long double)float(x), g = std::sqrt(-std::expm1(p)), s = 1 / (1 + std::exp(-p));
    relative("sqrt gate", float(p), gate_value<Gate::Sqrt>(float(p)), g, 4);
    relative("slope of the sqrt gate", float(p), gate_slope<Gate::Sqrt>(float(p)),
             -std::exp(p) / (2 * std::max<long double>(g, sqrt_gate_floor)), 6);
    relative("sigmoid gate", float(p), gate_value<Gate::Sigmoid>(float(p)), s, 6);
    relative("slope of the sigmoid gate", float(p), gate_slope<Gate::Sigmoid>(float(p)), s * (1 - s), 8);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  check(std::isnan(gate_value<Gate::Sigmoid>(nan)) && std::isnan(gate_value<Gate::Sqrt>(nan)) &&
            std::isnan(gate_value<Gate::Softplus>(nan)) && std::isnan(gate_value<Gate::Identity>(nan)),
        "gate of NaN", nan, 0, nan);
}

template <Activation kind>
void activation(const char* name) {
  for (double z = -12; z < 12; z += 0.0371) {
    const double h = 1e-6;
    close(name, z, activation_slope<kind>(z), (activate<kind>(z + h) - activate<kind>(z - h)) / (2 * h), 1e-8);
    close(name, z, double(activate<kind>(float(z))), activate<kind>(double(float(z))), 1e-6);
    close(name, z, double(activation_slope<kind>(float(z))), activation_slope<kind>(double(float(z))), 1e-6);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float z : {infinity, -infinity}) {
    check(!std::isnan(activate<kind>(z)) && !std::isnan(activation_slope<kind>(z)), name, z, activate<kind>(z), 0);
  }
}

}  // namespace

int main() {
  elementary_functions<float>();
  elementary_functions<double>();
  gate<Gate::Sigmoid>("sigmoid gate");
  gate<Gate::Sqrt>("sqrt gate");
  gate<Gate::Softplus>("softplus gate");
  gate<Gate::Identity>("identity gate");
  small_gates();
  activation<Activation::None>("no activation");
  activation<Activation::Relu>("relu");
  activation<Activation::Silu>("silu");
  activation<Activation::Gelu>("gelu");
  activation<Activation::Tanh>("tanh");
  activation<Activation::LeakyRelu>("leaky_relu");
  activation<Activation::Elu>("elu");
  for (const float p : {0.0f, 1e-30f, 5.0f, 89.0f, 1e30f}) {
    check(gate_value<Gate::Sqrt>(p) == 0.0f && gate_slope<Gate::Sqrt>(p) == 0.0f, "closed sqrt gate", p,
          gate_value<Gate::Sqrt>(p), 0);
  }
  for (const float p : {-1e-30f, -1e-12f, -1e-4f}) {
    check(std::fabs(gate_slope<Gate::Sqrt>(p)) <= 8.0f, "slope of the sqrt gate", p, gate_slope<Gate::Sqrt>(p), 8);
  }
  return tests::report();
}
