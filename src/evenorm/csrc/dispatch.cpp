// What does not depend on the instruction set, and the choice of it.

#include <cstdlib>
#include <cstring>

#include "engine.h"
#include "numbers.h"

namespace evenorm {

extern const Kernels kernels_baseline;

#if defined(EVENORM_X86_LEVELS)
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;

static const Kernels& choose() {
  const char* wanted = std::getenv("EVENORM_INSTRUCTIONS");  // for tests: every set must give right answers
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool at_most_v3 = wanted != nullptr && std::strcmp(wanted, "v3") == 0;
  const bool baseline = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  if (v4 && !at_most_v3 && !baseline) return kernels_v4;
  return v3 && !baseline ? kernels_v3 : kernels_baseline;
}

static bool find_bfloat16() {
  __builtin_cpu_init();  // this runs while the library is loaded
  return __builtin_cpu_supports("avx512bf16");
}
const bool rounds_to_bfloat16 = find_bfloat16();
#else
static const Kernels& choose() { return kernels_baseline; }
const bool rounds_to_bfloat16 = false;
#endif

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

double read(const Values& values, int64_t group, int64_t channel) {
  const int64_t at = group * values.group_stride + channel * values.channel_stride;
  switch (values.type) {
    case Type::float32: return static_cast<const float*>(values.data)[at];
    case Type::float64: return static_cast<const double*>(values.data)[at];
    case Type::bfloat16: return widen(static_cast<const bfloat16*>(values.data)[at]);
    case Type::float16: return widen(static_cast<const float16*>(values.data)[at]);
  }
  return 0;
}

template <class T>
static void write_all(const Values& values, int64_t first, int64_t count, const double* from) {
  T* to = static_cast<T*>(const_cast<void*>(values.data)) + first * values.channel_stride;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == 2) narrow(float(from[i]), to + i * values.channel_stride);
    else to[i * values.channel_stride] = T(from[i]);
  }
}

void write(const Values& values, int64_t first, int64_t count, const double* from) {
  switch (values.type) {
    case Type::float32: return write_all<float>(values, first, count, from);
    case Type::float64: return write_all<double>(values, first, count, from);
    case Type::bfloat16: return write_all<bfloat16>(values, first, count, from);
    case Type::float16: return write_all<float16>(values, first, count, from);
  }
}

}  // namespace evenorm
