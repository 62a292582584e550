// The operations, for one instruction set: this file is compiled once for each, with EVENORM_TARGET naming it. Everything but
// the table at the end is in an anonymous namespace, so that no function of one instruction set can serve another.

#include "work.h"

namespace {

struct Positions {  // one number for each group, on the stack where there are few
  int64_t few[16];
  int64_t* data;
  explicit Positions(int64_t groups)
      : data(groups <= 16 ? few : static_cast<int64_t*>(std::malloc(size_t(groups) * sizeof(int64_t)))) {}
  ~Positions() {
    if (data != few) std::free(data);
  }
};

template <class T>
bool pool(const Task& task, bool with_apply) {
  Work<T> work(task);
  Positions positions(task.groups);
  if (work.plan.failed || positions.data == nullptr) return false;
  work.count_valid(positions.data);
  const auto prepare = [&](int64_t g, int64_t panel) { work.prepare_moments(g, panel); };
  const auto sums = [&](int64_t g, int64_t column, int64_t chunk) { work.moment_sums(g, column, chunk, work.summed_in_doubles(g, column)); };
  const auto finish = [&](int64_t g, int64_t panel) { work.finish_moments(g, panel, with_apply); };
  const auto apply = [&](int64_t g, int64_t column, int64_t chunk) { work.apply(g, column, chunk); };
  with_apply ? work.phases(prepare, sums, finish, apply) : work.phases(prepare, sums, finish, Nothing{});
  return true;
}

struct Moments {
  template <class T>
  static bool run(const Task& task) { return pool<T>(task, false); }
};

struct TrainForward {
  template <class T>
  static bool run(const Task& task) { return pool<T>(task, true); }
};

struct Normalize {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    work.phases([&](int64_t g, int64_t panel) { work.channels.prepare_apply(g, panel); }, Nothing{}, Nothing{},
                [&](int64_t g, int64_t column, int64_t chunk) { work.apply(g, column, chunk); });
    return true;
  }
};

struct BackwardSums {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    work.phases([&](int64_t g, int64_t panel) { work.channels.prepare_gradient(g, panel); },
                [&](int64_t g, int64_t column, int64_t chunk) { work.gradient_sums(g, column, chunk); },
                [&](int64_t g, int64_t panel) { work.finish_gradient_sums(g, panel, false); }, Nothing{});
    return true;
  }
};

struct InputGradient {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    const bool centred = task.offset.data != nullptr;
    work.phases([&](int64_t g, int64_t panel) { work.channels.prepare_gradient(g, panel); }, Nothing{}, Nothing{},
                [&](int64_t g, int64_t column, int64_t chunk) { work.gradient(g, column, chunk, centred, false); });
    return true;
  }
};

struct TrainBackward {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    work.phases([&](int64_t g, int64_t panel) { work.channels.prepare_gradient(g, panel); },
                [&](int64_t g, int64_t column, int64_t chunk) { work.gradient_sums(g, column, chunk); },
                [&](int64_t g, int64_t panel) { work.finish_gradient_sums(g, panel, true); },
                [&](int64_t g, int64_t column, int64_t chunk) { work.gradient(g, column, chunk, true, true); });
    return true;
  }
};

// With fixed statistics nothing has to be known before dx: each unit is summed and written while it lies in the cache.
struct EvalBackward {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    if (!work.curved) work.kept = nullptr;  // dy is in the cache still
    const bool with_sums = task.sums[0] != nullptr;
    const auto unit = [&](int64_t g, int64_t column, int64_t chunk) {
      if (with_sums) work.gradient_sums(g, column, chunk);
      work.gradient(g, column, chunk, false, with_sums);
    };
    const auto finish = [&](int64_t g, int64_t panel) {
      if (with_sums) work.finish_gradient_sums(g, panel, false);
    };
    work.phases([&](int64_t g, int64_t panel) { work.channels.prepare_gradient(g, panel); }, unit, finish, Nothing{});
    return true;
  }
};

template <class Operation>
bool dispatch(const Task& task) {
  switch (task.type) {
    case Type::float32: return Operation::template run<float>(task);
    case Type::float64: return Operation::template run<double>(task);
    case Type::bfloat16: return Operation::template run<bfloat16>(task);
    case Type::float16: return Operation::template run<float16>(task);
  }
  return false;
}

}  // namespace

#define EVENORM_JOIN(a, b) a##b
#define EVENORM_TABLE(target) EVENORM_JOIN(kernels_, target)

namespace evenorm {

extern const Kernels EVENORM_TABLE(EVENORM_TARGET);
const Kernels EVENORM_TABLE(EVENORM_TARGET) = {
    dispatch<Moments>,       dispatch<Normalize>,     dispatch<TrainForward>, dispatch<BackwardSums>,
    dispatch<InputGradient>, dispatch<TrainBackward>, dispatch<EvalBackward>,
};

}  // namespace evenorm
