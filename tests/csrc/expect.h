// Counts what does not hold, for test programs without a framework.
#pragma once

#include <cstdio>
#include <string>

inline int num_failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++num_failures;
  std::printf("FAILED %s\n", what.c_str());
}
