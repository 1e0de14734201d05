// Checks with a message; the test program goes on and exits with the number of failures.
#pragma once
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "simt/executor.h"

namespace check {

inline int failures = 0;

// CHECK(condition, "what, with " << values)
#define CHECK(condition, message)                                               \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::ostringstream check_text;                                            \
      check_text << message;                                                    \
      if (++check::failures <= 20) {                                            \
        std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, \
                     check_text.str().c_str());                                 \
      }                                                                         \
    }                                                                           \
  } while (false)

// Runs under three schedules; the results must be the same bytes. A missing barrier shows here.
template <class Run>
auto reproducible(const std::string& what, const Run& run) {
  simt::seed = 1;
  const auto first = run();
  for (simt::seed = 2; simt::seed <= 3; ++simt::seed) {
    const auto again = run();
    const size_t bytes = first.size() * sizeof first[0];
    const bool same = again.size() == first.size() &&
                      (bytes == 0 || std::memcmp(again.data(), first.data(), bytes) == 0);
    CHECK(same, what << " depends on the order of the threads (seed " << simt::seed << ")");
  }
  return first;
}

inline int report(const char* program) {
  std::printf("%s: %d failures\n", program, failures);
  return failures != 0;
}

}  // namespace check
