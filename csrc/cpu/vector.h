// What the CPU kernels share: function multiversioning and short sums.
#pragma once

#include <cstdint>

#include "../gate.h"
#include "../storage.h"

// One portable binary holds AVX-512, AVX2 and baseline code of each marked function; the loader picks by processor. In
// the tests' build of the CUDA kernels one of them does, in a third of the compiler's time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(MRVAE_SHIM)
#define MRVAE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MRVAE_CLONES
#endif

namespace mrvae::cpu {

// The sum of a short run, in eight lanes: a loop with `omp simd reduction` spends more on its set-up than on 16 numbers.
template <class T>
MRVAE_HOST_DEVICE T short_sum(const T* values, std::int64_t n) {
  T lanes[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) lanes[k] += values[i + k];
  }
  T rest = 0;
  for (; i < n; ++i) rest += values[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest;
}

}  // namespace mrvae::cpu
