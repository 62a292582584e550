// The operations, for one instruction set: this file is compiled once for each, with EVENORM_TARGET naming it. Everything but
// the table at the end is in an anonymous namespace, so that no function of one instruction set can serve another.

#include <cmath>

#include "activations.h"
#include "stage.h"

namespace {

using evenorm::read;
using evenorm::Type;
using evenorm::Values;

enum Kind { mean_kind, scale_kind, bias_kind, offset_kind, slope_kind, inverse_kind };

double read_or(const Values& values, int64_t g, int64_t c, double otherwise) {
  return values.data == nullptr ? otherwise : read(values, g, c);
}

struct Nothing {  // a phase that an operation does not have
  void operator()(auto...) const {}
};
template <class Phase>
constexpr bool is_nothing = false;
template <>
constexpr bool is_nothing<Nothing> = true;

// One operation on one task: what its phases share.
template <class T>
struct Work {
  using S = compute_t<T>;
  const Task& task;
  Plan plan;
  bool curved;  // the activation needs a block of z

  bool keeps;   // g is put where dx will lie, so that the activation's slope is computed once

  explicit Work(const Task& given)
      : task(given),
        plan(given),
        curved(given.activation > relu_code),
        keeps(curved && sizeof(T) == sizeof(S)) {}

  Coefficients coefficients(int64_t g, int64_t panel) const {
    const int64_t at = panel * plan.panel_width;
    return {plan.coefficients(mean_kind, g) + at, plan.coefficients(scale_kind, g) + at,
            plan.coefficients(bias_kind, g) + at, plan.coefficients(offset_kind, g) + at,
            plan.coefficients(slope_kind, g) + at};
  }

  void set(Kind kind, int64_t g, int64_t c, double value) {
    double* at = plan.coefficients(kind, g) + c;
    for (int64_t r = 0; r < plan.repeat; ++r) at[r * task.channels] = value;
  }

  template <class F>
  void for_channels(int64_t panel, F&& work) {
    const int64_t first = panel * plan.panel_width, last = first + plan.width_of(panel);
    for (int64_t c = first; c < last; ++c) work(c);
  }

  // A division takes as long as the arithmetic of ten elements: each channel of a small input has one, and one root.
  double inverse_deviation(double var) const { return 1 / std::sqrt(var + task.eps); }
  double inverse_count(int64_t g) const {
    return task.var_count == nullptr ? 1 : 1 / (task.var_count[g] > 0 ? task.var_count[g] : 1);
  }

  void prepare_apply(int64_t g, int64_t panel) {
    const double share = inverse_count(g);
    for_channels(panel, [&](int64_t c) { set_apply(g, c, read(task.mean, g, c), read(task.var, g, c) * share); });
  }

  void set_apply(int64_t g, int64_t c, double mean, double var) {
    const double inverse = inverse_deviation(var);
    set(mean_kind, g, c, mean);
    set(scale_kind, g, c, read_or(task.weight, g, c, 1) * inverse);
    set(bias_kind, g, c, read_or(task.bias, g, c, 0));
    plan.coefficients(inverse_kind, g)[c] = inverse;
  }

  void prepare_gradient(int64_t g, int64_t panel) {
    prepare_apply(g, panel);
    if (task.offset.data == nullptr) return;
    for_channels(panel, [&](int64_t c) {
      set(offset_kind, g, c, read(task.offset, g, c));
      set(slope_kind, g, c, read(task.slope, g, c) * plan.coefficients(inverse_kind, g)[c]);
    });
  }

  // The shift: a valid value of the channel, so that a constant channel has sums of exactly 0.
  void prepare_moments(int64_t g, int64_t panel) {
    const int64_t position = first_valid[g];
    const T* x = static_cast<const T*>(task.x);
    for_channels(panel, [&](int64_t c) {
      double shift = 0;
      if (position >= 0) {
        const int64_t n = position / task.positions, l = position % task.positions;
        const int64_t at = plan.rows ? position * task.channels + c : (n * task.channels + c) * task.positions + l;
        shift = double(widen(x[at]));
      }
      set(mean_kind, g, c, std::isfinite(shift) ? shift : 0);
    });
  }

  // count and, for each group, where its first valid value is (-1: nowhere).
  void count_valid(int64_t* positions) {
    first_valid = positions;
    for (int64_t g = 0; g < task.groups; ++g) {
      const int64_t from = task.starts[g] * task.positions, to = task.starts[g + 1] * task.positions;
      int64_t count = to - from, first = count > 0 ? from : -1;
      if (task.mask != nullptr) {
        count = 0;
        for (int64_t i = from; i < to; ++i) count += task.mask[i];
        first = -1;
        for (int64_t i = from; i < to && first < 0; ++i)
          if (task.mask[i]) first = i;
      }
      positions[g] = first;
      task.count[g] = double(count);
    }
  }
  const int64_t* first_valid = nullptr;

  double* cleared(int64_t g, int64_t panel, int64_t chunk, int which) {
    double* at = plan.sums(plan.chunk_start[g] + chunk, which) + panel * plan.panel_width;
    const int64_t count = plan.width_of(panel) * plan.repeat;
    for (int64_t i = 0; i < count; ++i) at[i] = 0;
    return at;
  }

  void moment_sums(int64_t g, int64_t panel, int64_t chunk) {
    double* u = cleared(g, panel, chunk, 0);
    double* uv = cleared(g, panel, chunk, 1);
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, false);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Runs<const S> x = stage.input(task.x, block, 0, k.mean);
      const Tiles tiles = stage.tiles(block);
      for (int t = 0; t < tiles.count; ++t) {
        const Runs<const S> xs = seen(x, tiles.tile[t]);
        if (plan.rows) {
          wide_sums(tiles.tile[t].extent, MomentTerms<S>{xs}, k, u, uv);
        } else {
          narrow_sums(tiles.tile[t].extent, MomentTerms<S>{xs}, k, u, uv);
        }
      }
    });
  }

  double merged(int64_t g, int64_t c, int which) const {
    double sum = 0;
    for (int64_t chunk = plan.chunk_start[g]; chunk < plan.chunk_start[g + 1]; ++chunk) {
      const double* at = plan.sums(chunk, which) + c;
      for (int64_t r = 0; r < plan.repeat; ++r) sum += at[r * task.channels];
    }
    return sum;
  }

  double& sum_out(int which, int64_t g, int64_t c) { return task.sums[which][g * task.channels + c]; }

  void finish_moments(int64_t g, int64_t panel, bool apply) {
    const double share = 1 / (task.count[g] > 0 ? task.count[g] : 1);
    for_channels(panel, [&](int64_t c) {
      const double sum = merged(g, c, 0), square = merged(g, c, 1), step = sum * share;
      const double mean = plan.coefficients(mean_kind, g)[c] + step;
      const double m2 = square - sum * step;
      sum_out(0, g, c) = mean;
      sum_out(1, g, c) = m2 < 0 ? 0 : m2;
      if (apply) set_apply(g, c, mean, sum_out(1, g, c) * share);
    });
  }

  template <bool wide>
  void normalize_tiles(const Tiles& tiles, Runs<const S> x, Runs<const S> residual, Runs<S> y, const Coefficients& k,
                       bool relu) {
    for (int t = 0; t < tiles.count; ++t) {
      const Tile& tile = tiles.tile[t];
      const Runs<const S> xs = seen(x, tile), adds = seen(residual, tile);
      const Runs<S> ys = seen(y, tile);
      if (residual.data == nullptr) {
        relu ? normalize_block<wide, false, true>(tile.extent, xs, adds, ys, k)
             : normalize_block<wide, false, false>(tile.extent, xs, adds, ys, k);
      } else {
        relu ? normalize_block<wide, true, true>(tile.extent, xs, adds, ys, k)
             : normalize_block<wide, true, false>(tile.extent, xs, adds, ys, k);
      }
    }
  }

  void normalize_any(const Tiles& tiles, Runs<const S> x, Runs<const S> residual, Runs<S> y, const Coefficients& k,
                     bool relu) {
    if (plan.rows) {
      normalize_tiles<true>(tiles, x, residual, y, k, relu);
    } else {
      normalize_tiles<false>(tiles, x, residual, y, k, relu);
    }
  }

  void apply(int64_t g, int64_t panel, int64_t chunk) {
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, curved);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Runs<const S> x = stage.input(task.x, block, 0);
      const Runs<const S> residual = task.extra == nullptr ? Runs<const S>{} : stage.input(task.extra, block, 1);
      const Runs<S> y = stage.output(task.out, block, 2);
      normalize_any(stage.tiles(block), x, residual, y, k, task.activation == relu_code);
      if (curved)
        for (int64_t r = 0; r < block.rows; ++r)
          curve<S>(task.activation).value(y.row(r), block.width, S(task.parameter));
      stage.finish_output(task.out, block, 2);
    });
  }

  // The operands of backward over one block. Where the activation is curved, z is rebuilt in a buffer and g replaces dy.
  struct Gradient {
    Runs<const S> g, x, saved;
    Gate gate;
  };

  Gradient gradient_of(Stage<T>& stage, const Unit& block, const Coefficients& k) {
    const Runs<const S> x = stage.input(task.x, block, 0), dy = stage.input(task.dy, block, 1);
    const Runs<const S> saved = task.extra == nullptr ? Runs<const S>{} : stage.input(task.extra, block, 2);
    if (!curved) {
      const Gate with_relu = saved.data == nullptr ? Gate::input : Gate::output;
      return {dy, x, saved, task.activation == relu_code ? with_relu : Gate::none};
    }
    const Runs<S> z{stage.buffer[3], block.width}, g{stage.buffer[4], block.width};
    if (!task.extra_is_output) normalize_any(stage.tiles(block), x, saved, z, k, false);
    const auto copy_rows = [&](Runs<const S> from, Runs<S> to) {
      for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t i = 0; i < block.width; ++i) to.row(r)[i] = from.row(r)[i];
    };
    if (task.extra_is_output) copy_rows(saved, z);
    copy_rows(dy, g);
    curve<S>(task.activation).slope(z.data, g.data, block.rows * block.width, S(task.parameter));
    return {{g.data, g.stride}, x, {}, Gate::none};
  }

  template <bool wide, Gate gate>
  void sum_tiles(const Tiles& tiles, const Gradient& given, const Coefficients& k, double* u, double* uv) {
    for (int t = 0; t < tiles.count; ++t) {
      const Tile& tile = tiles.tile[t];
      const GradientTerms<gate, S> terms{seen(given.g, tile), seen(given.x, tile), seen(given.saved, tile)};
      pair_sums<wide>(tile.extent, terms, k, u, uv);
    }
  }

  template <bool wide>
  void sum_gated(const Tiles& tiles, const Gradient& given, const Coefficients& k, double* u, double* uv) {
    switch (given.gate) {
      case Gate::none: return sum_tiles<wide, Gate::none>(tiles, given, k, u, uv);
      case Gate::input: return sum_tiles<wide, Gate::input>(tiles, given, k, u, uv);
      case Gate::output: return sum_tiles<wide, Gate::output>(tiles, given, k, u, uv);
    }
  }

  void gradient_sums(int64_t g, int64_t panel, int64_t chunk, bool keep) {
    double* u = cleared(g, panel, chunk, 0);
    double* uv = cleared(g, panel, chunk, 1);
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, curved);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Gradient given = gradient_of(stage, block, k);
      plan.rows ? sum_gated<true>(stage.tiles(block), given, k, u, uv)
                : sum_gated<false>(stage.tiles(block), given, k, u, uv);
      if (keep) stage.keep(given.g, task.out, block);
    });
  }

  void finish_gradient_sums(int64_t g, int64_t panel, bool apply) {
    const double share = inverse_count(g);
    for_channels(panel, [&](int64_t c) {
      const double inverse = plan.coefficients(inverse_kind, g)[c];
      const double sum_g = merged(g, c, 0), sum_g_xhat = merged(g, c, 1) * inverse;
      sum_out(0, g, c) = sum_g;
      sum_out(1, g, c) = sum_g_xhat;
      if (!apply) return;
      set(offset_kind, g, c, sum_g * share);
      set(slope_kind, g, c, sum_g_xhat * share * inverse);
    });
  }

  template <bool wide, Gate gate, bool centred, bool residual>
  void gradient_tiles(const Tiles& tiles, const Gradient& given, const Coefficients& k, Runs<S> dx, Runs<S> dresidual) {
    for (int t = 0; t < tiles.count; ++t) {
      const Tile& tile = tiles.tile[t];
      gradient_block<wide, gate, centred, residual>(tile.extent, seen(given.g, tile), seen(given.x, tile),
                                                    seen(given.saved, tile), seen(dx, tile), seen(dresidual, tile), k);
    }
  }

  template <bool wide, Gate gate>
  void gradient_gated(const Tiles& tiles, const Gradient& given, const Coefficients& k, Runs<S> dx, Runs<S> dresidual,
                      bool centred) {
    if (centred) {
      dresidual.data == nullptr ? gradient_tiles<wide, gate, true, false>(tiles, given, k, dx, dresidual)
                                : gradient_tiles<wide, gate, true, true>(tiles, given, k, dx, dresidual);
    } else {
      dresidual.data == nullptr ? gradient_tiles<wide, gate, false, false>(tiles, given, k, dx, dresidual)
                                : gradient_tiles<wide, gate, false, true>(tiles, given, k, dx, dresidual);
    }
  }

  template <bool wide>
  void gradient_any(const Tiles& tiles, const Gradient& given, const Coefficients& k, Runs<S> dx, Runs<S> dresidual,
                    bool centred) {
    switch (given.gate) {
      case Gate::none: return gradient_gated<wide, Gate::none>(tiles, given, k, dx, dresidual, centred);
      case Gate::input: return gradient_gated<wide, Gate::input>(tiles, given, k, dx, dresidual, centred);
      case Gate::output: return gradient_gated<wide, Gate::output>(tiles, given, k, dx, dresidual, centred);
    }
  }

  void gradient(int64_t g, int64_t panel, int64_t chunk, bool centred, bool kept) {
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, curved);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Gradient given = kept ? Gradient{stage.kept(task.out, block, 4), stage.input(task.x, block, 0), {}, Gate::none}
                                  : gradient_of(stage, block, k);
      const Runs<S> dx = stage.output(task.out, block, 3);
      const Runs<S> dresidual = task.dresidual == nullptr ? Runs<S>{} : stage.output(task.dresidual, block, 5);
      const Tiles tiles = stage.tiles(block);
      plan.rows ? gradient_any<true>(tiles, given, k, dx, dresidual, centred)
                : gradient_any<false>(tiles, given, k, dx, dresidual, centred);
      stage.finish_output(task.out, block, 3);
      if (task.dresidual != nullptr) stage.finish_output(task.dresidual, block, 5);
    });
  }

  template <class F>
  void in_parallel(int64_t count, F work) {
    if (plan.serial || count <= 1) {
      for (int64_t i = 0; i < count; ++i) work(i);
      return;
    }
    task.parallel(
        count, [](int64_t begin, int64_t end, void* f) { for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(f))(i); },
        &work);
  }

  template <class F>
  void for_each_panel(F&& work) {
    in_parallel(task.groups * plan.panels, [&](int64_t i) { work(i / plan.panels, i % plan.panels); });
  }

  // `reverse` starts with what the phase before has left in the cache.
  template <class F>
  void for_each_unit(bool reverse, F&& work) {
    const int64_t count = plan.chunks() * plan.panels;
    if (plan.serial || count <= 1) {
      run_units(0, count, reverse, work);
      return;
    }
    struct Context {
      Work* self;
      F& work;
      bool reverse;
    } context{this, work, reverse};
    task.parallel(
        count,
        [](int64_t begin, int64_t end, void* given) {
          Context& c = *static_cast<Context*>(given);
          c.self->run_units(begin, end, c.reverse, c.work);
        },
        &context);
  }

  template <class F>
  void run_units(int64_t begin, int64_t end, bool reverse, F& work) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = reverse ? end - 1 - (i - begin) : i;
      const int64_t chunk = unit / plan.panels, g = plan.group_of(chunk);
      work(g, unit % plan.panels, chunk - plan.chunk_start[g]);
    }
  }

  // Coefficients and merging are too little work to wake threads for, unless there are many groups.
  template <class F>
  void for_few_panels(F&& work) {
    constexpr int64_t many = 64;
    if (task.groups * plan.panels >= many) return for_each_panel(work);
    for (int64_t g = 0; g < task.groups; ++g)
      for (int64_t panel = 0; panel < plan.panels; ++panel) work(g, panel);
  }

  // All phases of an operation: coefficients, sums, merge, apply; each is a function of (group, panel[, chunk]) or Nothing.
  template <class Prepare, class Sums, class Finish, class Apply>
  void phases(Prepare prepare, Sums sums, Finish finish, Apply apply) {
    if (plan.fused) {
      for_each_panel([&](int64_t g, int64_t panel) {
        const int64_t chunks = plan.chunk_start[g + 1] - plan.chunk_start[g];
        prepare(g, panel);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sums(g, panel, chunk);
        finish(g, panel);
        for (int64_t chunk = chunks; chunk-- > 0;) apply(g, panel, chunk);
      });
      return;
    }
    for_few_panels(prepare);
    if constexpr (!is_nothing<Sums>) for_each_unit(false, sums);
    if constexpr (!is_nothing<Finish>) for_few_panels(finish);
    if constexpr (!is_nothing<Apply>) for_each_unit(true, apply);
  }
};

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
  const auto sums = [&](int64_t g, int64_t panel, int64_t chunk) { work.moment_sums(g, panel, chunk); };
  const auto finish = [&](int64_t g, int64_t panel) { work.finish_moments(g, panel, with_apply); };
  const auto apply = [&](int64_t g, int64_t panel, int64_t chunk) { work.apply(g, panel, chunk); };
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
    work.phases([&](int64_t g, int64_t panel) { work.prepare_apply(g, panel); }, Nothing{}, Nothing{},
                [&](int64_t g, int64_t panel, int64_t chunk) { work.apply(g, panel, chunk); });
    return true;
  }
};

struct BackwardSums {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    work.phases([&](int64_t g, int64_t panel) { work.prepare_gradient(g, panel); },
                [&](int64_t g, int64_t panel, int64_t chunk) { work.gradient_sums(g, panel, chunk, false); },
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
    work.phases([&](int64_t g, int64_t panel) { work.prepare_gradient(g, panel); }, Nothing{}, Nothing{},
                [&](int64_t g, int64_t panel, int64_t chunk) { work.gradient(g, panel, chunk, centred, false); });
    return true;
  }
};

struct TrainBackward {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    work.phases([&](int64_t g, int64_t panel) { work.prepare_gradient(g, panel); },
                [&](int64_t g, int64_t panel, int64_t chunk) { work.gradient_sums(g, panel, chunk, work.keeps); },
                [&](int64_t g, int64_t panel) { work.finish_gradient_sums(g, panel, true); },
                [&](int64_t g, int64_t panel, int64_t chunk) { work.gradient(g, panel, chunk, true, work.keeps); });
    return true;
  }
};

// With fixed statistics nothing has to be known before dx: each unit is summed and written while it lies in the cache.
struct EvalBackward {
  template <class T>
  static bool run(const Task& task) {
    Work<T> work(task);
    if (work.plan.failed) return false;
    const bool with_sums = task.sums[0] != nullptr;
    const auto unit = [&](int64_t g, int64_t panel, int64_t chunk) {
      if (with_sums) work.gradient_sums(g, panel, chunk, work.keeps);
      work.gradient(g, panel, chunk, false, with_sums && work.keeps);
    };
    const auto finish = [&](int64_t g, int64_t panel) {
      if (with_sums) work.finish_gradient_sums(g, panel, false);
    };
    work.phases([&](int64_t g, int64_t panel) { work.prepare_gradient(g, panel); }, unit, finish, Nothing{});
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
#define EVENORM_TEXT_(text) #text
#define EVENORM_TEXT(text) EVENORM_TEXT_(text)

namespace evenorm {

extern const Kernels EVENORM_TABLE(EVENORM_TARGET);
const Kernels EVENORM_TABLE(EVENORM_TARGET) = {
    dispatch<Moments>,       dispatch<Normalize>,     dispatch<TrainForward>, dispatch<BackwardSums>,
    dispatch<InputGradient>, dispatch<TrainBackward>, dispatch<EvalBackward>, EVENORM_TEXT(EVENORM_TARGET),
};

}  // namespace evenorm
