// exp, expm1, log1p, tanh and the normal distribution for the gates and activations, free of branches so that host compilers turn a loop
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
  static constexpr float least = -87.3365f;                  // exp is no normal number below
};

template <>
struct Binary<double> {
  using Integer = std::int64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 18;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -746.0, highest = 710.0, least = -708.396;
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

// x = n ln 2 + r with |r| <= ln(2)/2: returns expm1(r).
template <class T>
MRVAE_HOST_DEVICE T split(T x, typename Binary<T>::Integer& n) {
  using B = Binary<T>;
  using Integer = typename B::Integer;
  const T shifted = x * T(1.4426950408889634074) + B::round;
  const T whole = shifted - B::round;
  const T r = (x - whole * B::ln2_high) - whole * B::ln2_low;
  Integer bits, zero;
  const T origin = B::round;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&zero, &origin, sizeof zero);
  n = bits - zero;
  return r + r * r * exp_tail<T, 2, B::exp_terms>(r);
}

// The same with 2^n as the product of two scales.
template <class T>
MRVAE_HOST_DEVICE T reduce(T x, T& first, T& second) {
  using B = Binary<T>;
  x = x < B::lowest ? B::lowest : x;
  x = x > B::highest ? B::highest : x;
  typename B::Integer n;
  const T tail = split(x, n);
  const typename B::Integer half = n >> 1;
  first = power<T>(half);
  second = power<T>(n - half);
  return tail;
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

// e^x, but no less than the smallest normal number, and 1 - e^x of an x <= 0, from one reduction. A NaN stays one.
template <class T>
MRVAE_HOST_DEVICE void decay(T x, T& power_of_e, T& rest) {
#if defined(__CUDA_ARCH__)
  power_of_e = ::exp(x);
  rest = -::expm1(x);
#else
  typename Binary<T>::Integer n;
  const T tail = split(x < Binary<T>::least ? Binary<T>::least : x, n), scale = power<T>(n);
  power_of_e = tail * scale + scale;
  rest = (T(1) - scale) - tail * scale;
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

// The standard normal distribution: returns its cumulative function at z, and sets density to exp(-z^2 / 2).
// float on the host: the tail 1 - cumulative(|z|) = exp(-z^2 / 2) q(1 / (1 + 0.3 |z|)), q a minimax fit of degree 8 with
// relative error 5.8e-8; no cancellation for negative z, unlike 1 + erf.
MRVAE_HOST_DEVICE float normal_cumulative(float z, float& density) {
  const float a = z < 0.0f ? -z : z;
  density = exp(-0.5f * a * a);
#if defined(__CUDA_ARCH__)
  const float tail = 0.5f * ::erfcf(a * 0.70710678f);
#else
  const float t = 1.0f / (1.0f + 0.3f * a);
  float q = 3.8334406596e-02f;
  q = q * t - 1.6895260632e-01f;
  q = q * t + 2.2821857827e-01f;
  q = q * t - 7.6000965400e-02f;
  q = q * t + 1.4218594420e-01f;
  q = q * t + 9.4832627666e-02f;
  q = q * t + 1.2188213705e-01f;
  q = q * t + 1.1949305313e-01f;
  q = q * t + 6.8534780841e-06f;
  const float tail = density * q;
#endif
  return z < 0.0f ? tail : 1.0f - tail;
}

MRVAE_HOST_DEVICE double normal_cumulative(double z, double& density) {
  density = exp(-0.5 * z * z);
  return 0.5 * ::erfc(z * -0.70710678118654752440);
}

}  // namespace elementary
}  // namespace mrvae
