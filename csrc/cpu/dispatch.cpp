// Which compiled set of kernels this machine can run, and which one is in use.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../calls.h"
#include "kernels.h"
#include "processor.h"

namespace sparseflow {

#define SF_DECLARE(NAME)                 \
  namespace NAME {                       \
  extern const Kernels<float> kKernelsF32;  \
  extern const Kernels<double> kKernelsF64; \
  double fma_rate_sample(long iterations, float* sink); \
  }
#if defined(SPARSEFLOW_HAVE_BASELINE)
SF_DECLARE(baseline)
#endif
#if defined(SPARSEFLOW_HAVE_AVX2)
SF_DECLARE(avx2)
#endif
#if defined(SPARSEFLOW_HAVE_AVX512)
SF_DECLARE(avx512)
#endif
#undef SF_DECLARE

namespace {

struct Candidate {
  KernelSet set;
  double (*fma_rate_sample)(long, float*);
};

int find(Candidate* out) {
  int n = 0;
#if defined(SPARSEFLOW_HAVE_BASELINE)
  out[n++] = {{"baseline", &baseline::kKernelsF32, &baseline::kKernelsF64}, baseline::fma_rate_sample};
#endif
#if defined(SPARSEFLOW_HAVE_AVX2)
  if (runs_avx2()) out[n++] = {{"avx2", &avx2::kKernelsF32, &avx2::kKernelsF64}, avx2::fma_rate_sample};
#endif
#if defined(SPARSEFLOW_HAVE_AVX512)
  if (runs_avx512()) out[n++] = {{"avx512", &avx512::kKernelsF32, &avx512::kKernelsF64}, avx512::fma_rate_sample};
#endif
  return n;
}

const Candidate& chosen() {
  static const Candidate choice = [] {
    Candidate found[3];
    const int n = find(found);
    const char* forced = std::getenv("SPARSEFLOW_ISA");
    if (forced == nullptr || *forced == 0) return found[n - 1];
    std::string known;
    for (int i = 0; i < n; ++i) {
      if (std::strcmp(found[i].set.name, forced) == 0) return found[i];
      known += std::string(i ? ", " : "") + found[i].set.name;
    }
    throw std::invalid_argument(std::string("SPARSEFLOW_ISA is '") + forced +
                                "', but this build on this machine can run: " + known + ". Unset it or name one of these.");
  }();
  return choice;
}

}  // namespace

const KernelSet& kernels() { return chosen().set; }

int available_sets(const KernelSet** out) {
  static KernelSet sets[3];
  Candidate found[3];
  const int n = find(found);
  for (int i = 0; i < n; ++i) sets[i] = found[i].set;
  *out = sets;
  return n;
}

double measure_fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  float sink = 0.0f;
  double best = 0.0;
  const auto start = Clock::now();
  do {
    look();
    const auto begin = Clock::now();
    const double done = chosen().fma_rate_sample(200000, &sink);
    best = std::max(best, done / std::chrono::duration<double>(Clock::now() - begin).count());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace sparseflow
