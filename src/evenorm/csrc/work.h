// One operation on one task: its coefficients, its phases on a unit of work, and how the units are gone through.
//
// Sums of many float32 run in float, a few terms at a time (blocks.h). Whether that is good enough is decided for each channel, by
// its coefficients and by what came of the sums; the others are computed in double, as is all of a small tensor.
#pragma once

#include <cmath>
#include <type_traits>

#include "activations.h"
#include "stage.h"

namespace {

using evenorm::read;
using evenorm::Type;
using evenorm::Values;

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
    return {plan.doubles_of(g) + at, plan.singles_of(g) + at, plan.wide};
  }

  // y is rounded once only where it is computed in double, which costs nothing beside the memory that it goes to; and a residual's
  // sign at z = 0 is right. A half precision result is rounded more coarsely anyway.
  bool applied_in_doubles(int64_t g, int64_t panel) const { return sizeof(T) > 2 || in_doubles(g, panel); }

  bool in_doubles(int64_t g, int64_t panel) const {
    return plan.doubles_only || !plan.scaled[g * plan.panels + panel];
  }

  template <class Number>
  void set(Number* table, Kind kind, int64_t c, double value) {
    Number* at = table + kind * plan.wide + c;
    for (int64_t r = 0; r < plan.repeat; ++r) at[r * task.channels] = Number(value);
  }

  template <class F>
  void for_channels(int64_t panel, F&& work) {
    const int64_t first = panel * plan.panel_width, last = first + plan.width_of(panel);
    for (int64_t c = first; c < last; ++c) work(c);
  }

  // As for_channels; work tells whether float is good enough for the channel.
  template <class F>
  void scale_channels(int64_t g, int64_t panel, F&& work) {
    bool scaled = true;
    for_channels(panel, [&](int64_t c) { scaled = work(c) && scaled; });
    if (!plan.doubles_only) plan.scaled[g * plan.panels + panel] = scaled;
  }

  // A division takes as long as the arithmetic of ten elements: each channel of a small input has one, and one root.
  double inverse_deviation(double var) const { return 1 / std::sqrt(var + task.eps); }
  double inverse_count(int64_t g) const {
    return task.var_count == nullptr ? 1 : 1 / (task.var_count[g] > 0 ? task.var_count[g] : 1);
  }

  void prepare_apply(int64_t g, int64_t panel) {
    const double share = inverse_count(g);
    scale_channels(g, panel, [&](int64_t c) { return set_apply(g, c, read(task.mean, g, c), read(task.var, g, c) * share); });
  }

  bool set_apply(int64_t g, int64_t c, double mean, double var) {
    const double inverse = inverse_deviation(var), scale = read_or(task.weight, g, c, 1) * inverse;
    const double bias = read_or(task.bias, g, c, 0);
    double* doubles = plan.doubles_of(g);
    set(doubles, mean_kind, c, mean);
    set(doubles, scale_kind, c, scale);
    set(doubles, bias_kind, c, bias);
    plan.inverse[g * plan.wide + c] = inverse;
    if (plan.doubles_only) return false;
    float* singles = plan.singles_of(g);
    set(singles, mean_kind, c, mean);
    set(singles, scale_kind, c, scale);
    set(singles, scale_rest_kind, c, scale - float(scale));
    set(singles, bias_kind, c, bias - (mean - float(mean)) * scale);
    return fits(mean) && fits(scale) && fits(bias);
  }

  void prepare_gradient(int64_t g, int64_t panel) {
    const double share = inverse_count(g);
    const bool gated = task.activation == relu_code && task.extra == nullptr;
    scale_channels(g, panel, [&](int64_t c) {
      const double mean = read(task.mean, g, c);
      bool fit = set_apply(g, c, mean, read(task.var, g, c) * share);
      if (gated) set_bounds(g, c);
      if (task.offset.data == nullptr) return fit;
      return set_slope(g, c, read(task.offset, g, c), read(task.slope, g, c) * plan.inverse[g * plan.wide + c]) && fit;
    });
  }

  // z = (x - mean) * scale + bias <= 0 between these. Rounded towards the inside for float, in which x is exact, so that no
  // element's sign depends on how z would have been rounded.
  void set_bounds(int64_t g, int64_t c) {
    double* doubles = plan.doubles_of(g);
    const double mean = doubles[mean_kind * plan.wide + c], scale = doubles[scale_kind * plan.wide + c];
    const double bias = doubles[bias_kind * plan.wide + c];
    double zero = mean - bias / scale;
    if (zero == mean && bias != 0) zero = std::nextafter(mean, (bias > 0) == (scale > 0) ? -HUGE_VAL : HUGE_VAL);
    double low = scale < 0 ? zero : -HUGE_VAL, high = scale > 0 ? zero : HUGE_VAL;
    if (scale == 0 ? !(bias <= 0) : std::isnan(zero)) low = NAN;  // nowhere: no x compares with it
    set(doubles, low_kind, c, low);
    set(doubles, high_kind, c, high);
    if (plan.doubles_only) return;
    set(plan.singles_of(g), low_kind, c, double(float(low)) < low ? std::nextafter(float(low), HUGE_VALF) : float(low));
    set(plan.singles_of(g), high_kind, c, double(float(high)) > high ? std::nextafter(float(high), -HUGE_VALF) : float(high));
  }

  bool set_slope(int64_t g, int64_t c, double offset, double slope) {
    set(plan.doubles_of(g), offset_kind, c, offset);
    set(plan.doubles_of(g), slope_kind, c, slope);
    if (plan.doubles_only) return false;
    const double mean = plan.doubles_of(g)[mean_kind * plan.wide + c];
    set(plan.singles_of(g), offset_kind, c, offset - (mean - float(mean)) * slope);
    set(plan.singles_of(g), slope_kind, c, slope);
    set(plan.singles_of(g), slope_rest_kind, c, slope - float(slope));
    return fits(offset) && fits(slope);
  }

  // Neither it nor its product with another such number leaves float's range.
  static bool fits(double value) { return std::fabs(value) < 1e15 && (value == 0 || std::fabs(value) > 1e-15); }

  // The shift: near the mean, so that the sums of squares keep their digits; a value of the channel where all are the same, so
  // that a constant channel has sums of exactly 0.
  void prepare_moments(int64_t g, int64_t panel) {
    scale_channels(g, panel, [&](int64_t c) {
      const double shift = near_mean(g, c);
      set(plan.doubles_of(g), mean_kind, c, shift);
      if (!plan.doubles_only) set(plan.singles_of(g), mean_kind, c, shift);
      return std::fabs(shift) < 1e30;
    });
  }

  double near_mean(int64_t g, int64_t c) const {
    const int64_t position = first_valid[g];
    if (position < 0) return 0;
    const T* x = static_cast<const T*>(task.x);
    const int64_t n = position / task.positions, l = position % task.positions;
    const int64_t at = plan.rows ? position * task.channels + c : (n * task.channels + c) * task.positions + l;
    const int64_t there = plan.rows ? plan.samples_of(g) * task.positions : task.positions;
    const bool one = plan.doubles_only || task.mask != nullptr || there < looked_at;
    double shift = widen(x[at]);
    if (!one) {
      for (int64_t i = 1; i < looked_at; ++i) shift += widen(x[at + i * (plan.rows ? task.channels : 1)]);
      shift = float(shift / looked_at);
    }
    return std::isfinite(shift) ? shift : 0;
  }
  static constexpr int64_t looked_at = 8;

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

  void moment_sums(int64_t g, int64_t panel, int64_t chunk, bool doubles) {
    double* u = cleared(g, panel, chunk, 0);
    double* uv = cleared(g, panel, chunk, 1);
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, false, doubles);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Runs x = stage.input(task.x, block, 0, k.doubles);
      with_types(stage.direct, doubles, [&]<class V, class E>(Types<V, E>) {
        const Tiles tiles = stage.tiles(block);
        for (int t = 0; t < tiles.count; ++t) {
          const MomentTerms<E> terms{seen<E>(x, tiles.tile[t])};
          plan.rows ? wide_sums<V>(tiles.tile[t].extent, terms, k, u, uv)
                    : narrow_sums<V>(tiles.tile[t].extent, terms, k, u, uv);
        }
      });
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

  // Where float was not good enough for a channel, all is summed once more, in double: squares that left its range, a shift so far
  // from the mean that the squares' digits cancel, or numbers that are not finite.
  void finish_moments(int64_t g, int64_t panel, bool apply) {
    const double count = task.count[g] > 0 ? task.count[g] : 1, share = 1 / count;
    bool held = true;
    if (!in_doubles(g, panel))
      for_channels(panel, [&](int64_t c) {
        const double sum = merged(g, c, 0), m2 = merged(g, c, 1) - sum * sum * share;
        held = held && m2 * share > 1e-25 && m2 * share < 1e25 && sum * sum * share < 16 * m2;
      });
    if (!held)
      for (int64_t chunk = 0; chunk < plan.chunk_start[g + 1] - plan.chunk_start[g]; ++chunk)
        moment_sums(g, panel, chunk, true);
    scale_channels(g, panel, [&](int64_t c) {
      const double sum = merged(g, c, 0), square = merged(g, c, 1), step = sum * share;
      const double mean = plan.doubles_of(g)[mean_kind * plan.wide + c] + step;
      const double m2 = square - sum * step;
      sum_out(0, g, c) = mean;
      sum_out(1, g, c) = m2 < 0 ? 0 : m2;
      return apply ? set_apply(g, c, mean, sum_out(1, g, c) * share) : false;
    });
  }

  // In what a block is computed: V, and what it is read from and written to: E.
  template <class V, class E>
  struct Types {};

  template <class F>
  static void with_types(bool direct, bool doubles, F&& work) {
    if constexpr (sizeof(T) == sizeof(double)) {
      work(Types<Doubles, T>{});
    } else if (doubles) {
      work(Types<Doubles, float>{});
    } else if (direct) {
      work(Types<Singles, T>{});
    } else {
      work(Types<Singles, float>{});
    }
  }

  // Here and below, flags known at run time become arguments of templates by way of a call.
  template <class F>
  static void with_flag(bool flag, F&& work) {
    flag ? work(std::true_type{}) : work(std::false_type{});
  }

  void normalize_any(const Tiles& tiles, Runs x, Runs residual, Runs y, const Coefficients& k, bool relu, bool direct,
                     bool doubles) {
    with_types(direct, doubles, [&]<class V, class E>(Types<V, E>) {
      with_flag(plan.rows, [&](auto wide) {
        with_flag(residual.data != nullptr, [&](auto with_residual) {
          with_flag(relu, [&](auto with_relu) {
            for (int t = 0; t < tiles.count; ++t) {
              const Tile& tile = tiles.tile[t];
              normalize_block<V, E, wide(), with_residual(), with_relu()>(tile.extent, seen<E>(x, tile), seen<E>(residual, tile),
                                                                        seen<E>(y, tile), k);
            }
          });
        });
      });
    });
  }

  void apply(int64_t g, int64_t panel, int64_t chunk) {
    const Coefficients k = coefficients(g, panel);
    const bool doubles = applied_in_doubles(g, panel);
    Stage<T> stage(plan, curved, doubles);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Runs x = stage.input(task.x, block, 0);
      const Runs residual = task.extra == nullptr ? Runs{} : stage.input(task.extra, block, 1);
      const Runs y = stage.output(task.out, block, 2);
      normalize_any(stage.tiles(block), x, residual, y, k, task.activation == relu_code, stage.direct, doubles);
      if (curved)
        for (int64_t r = 0; r < block.rows; ++r)
          curve<S>(task.activation).value(y.row<S>(r), block.width, S(task.parameter));
      stage.finish_output(task.out, block, 2);
    });
    if (stage.stream) finish_streams();
  }

  // The operands of backward over one block. Where the activation is curved, z is rebuilt in a buffer and g replaces dy.
  struct Gradient {
    Runs g, x, saved;
    Gate gate;
  };

  Gradient gradient_of(Stage<T>& stage, const Unit& block, const Coefficients& k, bool doubles) {
    const Runs x = stage.input(task.x, block, 0), dy = stage.input(task.dy, block, 1);
    const Runs saved = task.extra == nullptr ? Runs{} : stage.input(task.extra, block, 2);
    if (!curved) {
      const Gate with_relu = saved.data == nullptr ? Gate::input : Gate::output;
      return {dy, x, saved, task.activation == relu_code ? with_relu : Gate::none};
    }
    const Runs z{stage.buffer[3], block.width}, g{stage.buffer[4], block.width};
    if (!task.extra_is_output) normalize_any(stage.tiles(block), x, saved, z, k, false, stage.direct, doubles);
    const auto copy_rows = [&](Runs from, Runs to) {
      for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t i = 0; i < block.width; ++i) to.row<S>(r)[i] = from.row<S>(r)[i];
    };
    if (task.extra_is_output) copy_rows(saved, z);
    copy_rows(dy, g);
    curve<S>(task.activation).slope(z.row<S>(0), g.row<S>(0), block.rows * block.width, S(task.parameter));
    return {g, x, {}, Gate::none};
  }

  template <class F>
  static void with_gate(Gate gate, F&& work) {
    switch (gate) {
      case Gate::none: return work(std::integral_constant<Gate, Gate::none>{});
      case Gate::input: return work(std::integral_constant<Gate, Gate::input>{});
      case Gate::output: return work(std::integral_constant<Gate, Gate::output>{});
    }
  }

  void gradient_sums(int64_t g, int64_t panel, int64_t chunk, bool keep) {
    gradient_sums(g, panel, chunk, keep, in_doubles(g, panel));
  }
  void gradient_sums(int64_t g, int64_t panel, int64_t chunk, bool keep, bool doubles) {
    double* u = cleared(g, panel, chunk, 0);
    double* uv = cleared(g, panel, chunk, 1);
    const Coefficients k = coefficients(g, panel);
    Stage<T> stage(plan, curved, doubles);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Gradient given = gradient_of(stage, block, k, doubles);
      const Tiles tiles = stage.tiles(block);
      with_types(stage.direct, doubles, [&]<class V, class E>(Types<V, E>) {
        with_gate(given.gate, [&](auto gate) {
          for (int t = 0; t < tiles.count; ++t) {
            const Tile& tile = tiles.tile[t];
            const GradientTerms<gate(), E> terms{seen<E>(given.g, tile), seen<E>(given.x, tile), seen<E>(given.saved, tile)};
            plan.rows ? wide_sums<V>(tile.extent, terms, k, u, uv) : narrow_sums<V>(tile.extent, terms, k, u, uv);
          }
        });
      });
      if (keep) stage.keep(given.g, task.out, block);
    });
  }

  // As in finish_moments, what left the range of float is summed once more in double.
  void finish_gradient_sums(int64_t g, int64_t panel, bool apply, bool keep) {
    const bool singles = !in_doubles(g, panel);
    bool held = true;
    const auto whole = [](double sum) { return sum == 0 || (std::fabs(sum) > 1e-20 && std::fabs(sum) < 1e30); };
    if (singles)
      for_channels(panel, [&](int64_t c) { held = held && whole(merged(g, c, 0)) && whole(merged(g, c, 1)); });
    if (!held)
      for (int64_t chunk = 0; chunk < plan.chunk_start[g + 1] - plan.chunk_start[g]; ++chunk)
        gradient_sums(g, panel, chunk, keep, true);
    const double share = inverse_count(g);
    scale_channels(g, panel, [&](int64_t c) {
      const double inverse = plan.inverse[g * plan.wide + c], mean = plan.doubles_of(g)[mean_kind * plan.wide + c];
      const double rest = singles && held ? mean - float(mean) : 0;
      const double sum_g = merged(g, c, 0), sum_g_xhat = (merged(g, c, 1) - rest * sum_g) * inverse;
      sum_out(0, g, c) = sum_g;
      sum_out(1, g, c) = sum_g_xhat;
      return apply ? set_slope(g, c, sum_g * share, sum_g_xhat * share * inverse) && singles && held : singles && held;
    });
  }

  void gradient(int64_t g, int64_t panel, int64_t chunk, bool centred, bool kept) {
    const Coefficients k = coefficients(g, panel);
    const bool doubles = in_doubles(g, panel);
    Stage<T> stage(plan, curved, doubles);
    stage.for_each_block(plan.unit(g, panel, chunk), [&](const Unit& block) {
      const Gradient given = kept ? Gradient{stage.kept(task.out, block, 4), stage.input(task.x, block, 0), {}, Gate::none}
                                  : gradient_of(stage, block, k, doubles);
      const Runs dx = stage.output(task.out, block, 3);
      const Runs dresidual = task.dresidual == nullptr ? Runs{} : stage.output(task.dresidual, block, 5);
      gradient_any(stage.tiles(block), given, k, dx, dresidual, centred, stage.direct, doubles);
      stage.finish_output(task.out, block, 3);
      if (task.dresidual != nullptr) stage.finish_output(task.dresidual, block, 5);
    });
    if (stage.stream) finish_streams();
  }

  void gradient_any(const Tiles& tiles, const Gradient& given, const Coefficients& k, Runs dx, Runs dresidual, bool with_centre,
                    bool direct, bool doubles) {
    with_types(direct, doubles, [&]<class V, class E>(Types<V, E>) {
      with_flag(plan.rows, [&](auto wide) {
        with_flag(with_centre, [&](auto centred) {
          with_gate(given.gate, [&](auto gate) {
            for (int t = 0; t < tiles.count; ++t) {
              const Tile& tile = tiles.tile[t];
              gradient_block<V, E, wide(), gate(), centred()>(tile.extent, seen<E>(given.g, tile), seen<E>(given.x, tile),
                                                            seen<E>(given.saved, tile), seen<E>(dx, tile),
                                                            seen<E>(dresidual, tile), k);
            }
          });
        });
      });
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

}  // namespace
