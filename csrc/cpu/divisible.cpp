// Whether y = g u tells u: nearly every gate is a number to divide by, and one look at all of them says so.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

// How many gates y cannot be divided by. Without an early end, and counted in T, for a loop of vectors: nearly every time
// there is none.
template <bool positive, class T>
MRVAE_HOST_DEVICE T count_undivisible(const T* gate, std::int64_t n, T a_zero) {
  constexpr T least = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  T found = 0;
#pragma omp simd reduction(+ : found)
  for (std::int64_t i = 0; i < n; ++i) {
    const T g = gate[i], size = positive ? g : std::abs(g), small = g == T(0) ? a_zero : T(1);
    found += size >= least ? T(0) : small;
  }
  return found;
}

template <class T>
MRVAE_CLONES T undivisible(const T* gate, std::int64_t n, bool positive, bool zeros) {
  const T a_zero = zeros ? T(0) : T(1);
  return positive ? count_undivisible<true>(gate, n, a_zero) : count_undivisible<false>(gate, n, a_zero);
}

}  // namespace

template <class T>
bool divisible(const T* gate, std::int64_t n, bool positive, bool zeros) {
  return undivisible(gate, n, positive, zeros) == T(0);
}
template bool divisible<float>(const float*, std::int64_t, bool, bool);
template bool divisible<double>(const double*, std::int64_t, bool, bool);

}  // namespace mrvae::cpu
