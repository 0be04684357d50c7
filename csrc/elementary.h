// exp, expm1, log1p, tanh and erf for the gates and activations, free of branches so that host compilers turn a loop
// over them into vector code (a call of std::exp stays scalar without -ffast-math). The device uses its own library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MRVAE_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MRVAE_HOST_DEVICE inline __attribute__((always_inline))
#else
#define MRVAE_HOST_DEVICE inline
#endif

namespace mrvae {
namespace elementary {

template <class T>
struct Binary;

template <>
struct Binary<float> {
  using Integer = std::int32_t;
  static constexpr int mantissa = 23, bias = 127, exp_terms = 7, log_terms = 8;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -104.0f, highest = 89.0f;  // exp is 0 below, inf above
};

template <>
struct Binary<double> {
  using Integer = std::int64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 18;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -746.0, highest = 710.0;
};

constexpr double inverse_factorial(int n) { return n <= 1 ? 1.0 : inverse_factorial(n - 1) / n; }

// sum over k >= n of r^(k-n)/k!, up to k = last
template <class T, int n, int last>
MRVAE_HOST_DEVICE T exp_tail(T r) {
  if constexpr (n == last) {
    return T(inverse_factorial(n));
  } else {
    return T(inverse_factorial(n)) + r * exp_tail<T, n + 1, last>(r);
  }
}

// sum over k >= n of q^(k-n)/(2k+1), up to k = last
template <class T, int n, int last>
MRVAE_HOST_DEVICE T atanh_tail(T q) {
  if constexpr (n == last) {
    return T(1) / T(2 * n + 1);
  } else {
    return T(1) / T(2 * n + 1) + q * atanh_tail<T, n + 1, last>(q);
  }
}

// 2^n for any n whose half is a normal exponent is power(half) * power(n - half)
template <class T>
MRVAE_HOST_DEVICE T power(typename Binary<T>::Integer n) {
  using Integer = typename Binary<T>::Integer;
  const Integer bits = (n + Integer(Binary<T>::bias)) << Binary<T>::mantissa;
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x = n ln 2 + r with |r| <= ln(2)/2: writes 2^n as the product of two scales, and expm1(r).
template <class T>
MRVAE_HOST_DEVICE T reduce(T x, T& first, T& second) {
  using B = Binary<T>;
  using Integer = typename B::Integer;
  x = x < B::lowest ? B::lowest : x;
  x = x > B::highest ? B::highest : x;
  const T shifted = x * T(1.4426950408889634074) + B::round;
  const T whole = shifted - B::round;
  const T r = (x - whole * B::ln2_high) - whole * B::ln2_low;
  Integer bits, zero;
  const T origin = B::round;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&zero, &origin, sizeof zero);
  const Integer n = bits - zero, half = n >> 1;
  first = power<T>(half);
  second = power<T>(n - half);
  return r + r * r * exp_tail<T, 2, B::exp_terms>(r);
}

template <class T>
MRVAE_HOST_DEVICE T exp(T x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  T first, second;
  const T tail = reduce(x, first, second);
  return (T(1) + tail) * first * second;
#endif
}

template <class T>
MRVAE_HOST_DEVICE T expm1(T x) {
#if defined(__CUDA_ARCH__)
  return ::expm1(x);
#else
  T first, second;
  const T tail = reduce(x, first, second);
  const T scale = first * second;
  // for x > ln(max) the scale overflows alone; the product below does not need it there
  return x > T(40) ? (T(1) + tail) * first * second : tail * scale + (scale - T(1));
#endif
}

// log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x))
template <class T>
MRVAE_HOST_DEVICE T log1p(T x) {
#if defined(__CUDA_ARCH__)
  return ::log1p(x);
#else
  const T s = x / (T(2) + x);
  return T(2) * s * atanh_tail<T, 0, Binary<T>::log_terms - 1>(s * s);
#endif
}

template <class T>
MRVAE_HOST_DEVICE T tanh(T x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  const T magnitude = x < T(0) ? -x : x;
  const T tail = expm1(T(-2) * magnitude);
  const T value = -tail / (T(2) + tail);
  return x < T(0) ? -value : value;
#endif
}

// float on the host: erf(x) = x p(x^2) for |x| < 1, 1 - exp(-x^2) q(1/(1 + x/2)) up to 4, 1 beyond. p and q are Chebyshev
// fits of degree 7 with absolute errors 3.4e-11 and 9.4e-11; the error against double is below 1.2e-7.
MRVAE_HOST_DEVICE float erf(float x) {
#if defined(__CUDA_ARCH__)
  return ::erff(x);
#else
  float a = x < 0.0f ? -x : x;
  a = a > 4.0f ? 4.0f : a;
  const float s = a * a;
  float p = -9.6735902378e-06f;
  p = p * s + 1.1268253699e-04f;
  p = p * s - 8.4843965243e-04f;
  p = p * s + 5.2210534108e-03f;
  p = p * s - 2.6865438310e-02f;
  p = p * s + 1.1283782622e-01f;
  p = p * s - 3.7612638476e-01f;
  p = p * s + 1.1283791671e+00f;
  const float t = 1.0f / (1.0f + 0.5f * a);
  float q = 1.2026210860e-01f;
  q = q * t - 4.7445799619e-01f;
  q = q * t + 5.6819126005e-01f;
  q = q * t - 1.0769317560e-01f;
  q = q * t + 3.4980761599e-01f;
  q = q * t + 2.5910447189e-01f;
  q = q * t + 2.8500553793e-01f;
  q = q * t - 1.6045761996e-04f;
  const float value = a < 1.0f ? a * p : 1.0f - exp(-s) * q;
  return x < 0.0f ? -value : value;
#endif
}

MRVAE_HOST_DEVICE double erf(double x) { return ::erf(x); }

}  // namespace elementary
}  // namespace mrvae
