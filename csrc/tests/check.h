// A minimal check for the C++ tests: counts failures and prints the first ones of them.
#pragma once

#include <cmath>
#include <cstdio>

namespace mrvae::tests {

inline int failures = 0;

inline void check(bool holds, const char* what, double at, double value, double expected) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED %s at %.9g: got %.9g, expected %.9g\n", what, at, value, expected);
}

inline void close(const char* what, double at, double value, double expected, double tolerance) {
  check(std::fabs(value - expected) <= tolerance * std::fmax(1.0, std::fabs(expected)), what, at, value, expected);
}

inline int report() {
  std::printf(failures == 0 ? "passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace mrvae::tests
