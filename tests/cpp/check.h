// The few lines of a test framework that these tests need.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// |a - b| <= tolerance * max(1, |b|); nan equals nan, inf equals inf.
inline bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= tolerance * std::fmax(1.0, std::fabs(b));
}
#define CHECK_CLOSE(a, b, tolerance)                                                               \
  do {                                                                                             \
    const double check_a = double(a), check_b = double(b);                                         \
    if (!close(check_a, check_b, tolerance)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s = %.17g, but %s = %.17g\n", __FILE__, __LINE__, #a, check_a, \
                   #b, check_b);                                                                   \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (false)
