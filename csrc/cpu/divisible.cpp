// Whether y = g v + t tells v: nearly every gate is a number to divide by and nearly every shift of its size, and one
// look at all of them says so.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

template <class T>
constexpr T least = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

// How many gates y cannot be divided by. Without an early end, and counted in T, for a loop of vectors: nearly every time
// there is none.
template <bool positive, class T>
MRVAE_HOST_DEVICE T count_undivisible(const T* gate, std::int64_t n, T a_zero) {
  T found = 0;
#pragma omp simd reduction(+ : found)
  for (std::int64_t i = 0; i < n; ++i) {
    const T g = gate[i], size = positive ? g : std::abs(g), small = g == T(0) ? a_zero : T(1);
    found += size >= least<T> ? T(0) : small;
  }
  return found;
}

template <class T>
MRVAE_CLONES T undivisible(const T* gate, std::int64_t n, bool positive, bool zeros) {
  const T a_zero = zeros ? T(0) : T(1);
  return positive ? count_undivisible<true>(gate, n, a_zero) : count_undivisible<false>(gate, n, a_zero);
}

// y - t has y's rounding, so that v is off by |t| / g of a last digit: by 1.5e-5 in float32 at most. Of a v that is smaller
// still a gate's gradient has few digits; y, and with it the loss, has no more of it.
template <class T>
MRVAE_HOST_DEVICE bool separates(T g, T size_of_shift) {
  return (g >= least<T>) & (size_of_shift <= T(256) * g);
}

template <class T>
MRVAE_CLONES T inseparable(const T* gate, const T* shift, std::int64_t n) {
  T found = 0;
#pragma omp simd reduction(+ : found)
  for (std::int64_t i = 0; i < n; ++i) found += separates(gate[i], std::fabs(shift[i])) ? T(0) : T(1);
  return found;
}

// The arguments p of gates to be made, over a range of etas.
template <int degree, class T>
class Arguments {
 public:
  Arguments(const GateParameters<const T>& with, T low, T high) : with_(with) {
    const T step = (high - low) / T(points - 1);
    for (int k = 0; k < points; ++k) {
      for (int j = 0; j < degree; ++j) basis_[k][j] = polynomial(j, low + T(k) * step);
    }
    // between two points a curve leaves its chord by step^2 / 8 of its second derivative
    const T bend[] = {T(0), T(2), T(6) * std::max(std::fabs(low), std::fabs(high))};
    for (int j = 0; j < degree; ++j) margin_[j] = step * step / T(8) * bend[j];
  }

  // Of n gates from `begin`, at most a block of them, the least and the greatest p; NaN where one is no finite number.
  // Point by point, in loops over the gates: of all points of one gate GCC makes no vectors.
  MRVAE_HOST_DEVICE void bounds(std::int64_t begin, std::int64_t n, T* least, T* most) const {
    const GateParameters<const T> with = with_.from(begin);
    std::fill_n(least, n, std::numeric_limits<T>::max());
    std::fill_n(most, n, std::numeric_limits<T>::lowest());
    for (int k = 0; k < points; ++k) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) {
        T p = with.bias[i];
        for (int j = 0; j < degree; ++j) p += with.row(j)[i] * basis_[k][j];
        least[i] = p < least[i] ? p : least[i];
        most[i] = p > most[i] ? p : most[i];
      }
    }
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      T margin = 0, sum = with.bias[i];
      for (int j = 0; j < degree; ++j) {
        margin += margin_[j] * std::fabs(with.row(j)[i]);
        sum += with.row(j)[i];
      }
      least[i] -= margin + T(0) * sum;
      most[i] += margin + T(0) * sum;
    }
  }

 private:
  static constexpr int points = degree == 1 ? 2 : 5;
  GateParameters<const T> with_;
  T basis_[points][degree], margin_[degree];
};

constexpr std::int64_t block = 256;  // gates whose bounds are found at a time

// How many p may be below that.
template <int degree, class T>
MRVAE_CLONES T below(Arguments<degree, T> arguments, std::int64_t n, T lowest) {
  T least[block], most[block], found = 0;
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t size = std::min(block, n - begin);
    arguments.bounds(begin, size, least, most);
#pragma omp simd reduction(+ : found)
    for (std::int64_t i = 0; i < size; ++i) found += least[i] >= lowest ? T(0) : T(1);
  }
  return found;
}

template <Gate kind, int degree, class T>
MRVAE_CLONES T inseparable_of(Arguments<degree, T> gates, Arguments<degree, T> shifts, std::int64_t n) {
  T least[block], most[block], low[block], high[block], found = 0;
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t size = std::min(block, n - begin);
    gates.bounds(begin, size, least, most);
    shifts.bounds(begin, size, low, high);
    // together with the sum it would not be a loop of vectors: 12 ns a gate in place of 4
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) least[i] = gate_value<kind>(least[i]);
#pragma omp simd reduction(+ : found)
    for (std::int64_t i = 0; i < size; ++i) found += separates(least[i], std::max(high[i], -low[i])) ? T(0) : T(1);
  }
  return found;
}

}  // namespace

template <class T>
bool divisible(const T* gate, std::int64_t n, bool positive, bool zeros) {
  return undivisible(gate, n, positive, zeros) == T(0);
}

template <class T>
bool separable(const T* gate, const T* shift, std::int64_t n) {
  return inseparable(gate, shift, n) == T(0);
}

template <class T>
bool divisible(const GateParameters<const T>& gates, Gate kind, std::int64_t n, T low, T high) {
  if (kind == Gate::Identity) return false;  // anything, and no gate of a network is one
  // e^p / 2, which is less than a sigmoid or softplus, is far above the least divisor here; of the smallest p < 0 a root is
  // no small divisor, and a closed gate has no gradient
  T lowest = std::is_same_v<T, double> ? -600 : -60;
  if (kind == Gate::Sqrt) lowest = std::numeric_limits<T>::lowest();
  bool all = false;
  with_degree(gates.degree, [&](auto degree) { all = below(Arguments<degree, T>(gates, low, high), n, lowest) == T(0); });
  return all;
}

template <class T>
bool separable(const GateParameters<const T>& gates, Gate kind, const GateParameters<const T>& shifts, std::int64_t n,
               T low, T high) {
  bool all = false;
  with_degree(gates.degree, [&](auto degree) {
    const Arguments<degree, T> p(gates, low, high), q(shifts, low, high);
    if (kind == Gate::Sigmoid) all = inseparable_of<Gate::Sigmoid>(p, q, n) == T(0);
    if (kind == Gate::Softplus) all = inseparable_of<Gate::Softplus>(p, q, n) == T(0);
  });
  return all;
}

#define MRVAE_INSTANTIATE(T)                                                                                          \
  template bool divisible<T>(const T*, std::int64_t, bool, bool);                                                     \
  template bool separable<T>(const T*, const T*, std::int64_t);                                                       \
  template bool divisible<T>(const GateParameters<const T>&, Gate, std::int64_t, T, T);                               \
  template bool separable<T>(const GateParameters<const T>&, Gate, const GateParameters<const T>&, std::int64_t, T, T);
MRVAE_INSTANTIATE(float)
MRVAE_INSTANTIATE(double)
#undef MRVAE_INSTANTIATE

}  // namespace mrvae::cpu
