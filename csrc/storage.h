// 16-bit floating-point numbers as bits, and conversions between what memory holds and what kernels compute in.
#pragma once

#include <cstdint>
#include <cstring>

#include "elementary.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace mrvae {

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

namespace storage {

MRVAE_HOST_DEVICE float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MRVAE_HOST_DEVICE std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace storage

MRVAE_HOST_DEVICE float load(float value) { return value; }
MRVAE_HOST_DEVICE double load(double value) { return value; }
MRVAE_HOST_DEVICE float load(BFloat16 value) { return storage::as_float(std::uint32_t(value.bits) << 16); }

MRVAE_HOST_DEVICE float load(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return storage::as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // as a float with the exponent's bias off by 112, which a product sets right for subnormal numbers as well
  return storage::as_float(sign | storage::as_bits(storage::as_float(rest << 13) * 5.192296858534828e33f));
#endif
}

MRVAE_HOST_DEVICE void store(float& target, float value) { target = value; }
MRVAE_HOST_DEVICE void store(double& target, double value) { target = value; }

MRVAE_HOST_DEVICE void store(BFloat16& target, float value) {
  const std::uint32_t bits = storage::as_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  target.bits = std::uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MRVAE_HOST_DEVICE void store(Half& target, float value) {
#if defined(__CUDA_ARCH__)
  target.bits = __half_as_ushort(__float2half_rn(value));
#else
  const std::uint32_t bits = storage::as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520, the first number that rounds to infinity
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: subnormal; adding 1/2 leaves its digits, rounded, at the end
    rounded = storage::as_bits(storage::as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  target.bits = std::uint16_t(sign | rounded);
#endif
}

}  // namespace mrvae
