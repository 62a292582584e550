// One operation on one task: its coefficients, its phases on a unit of work, and how the units are gone through.
//
// Sums of many float32 run in float, a few terms at a time (blocks.h). Whether that is good enough is decided for each channel, by
// its coefficients and by what came of the sums; the others are computed in double, as is all of a small tensor.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "channels.h"
#include "spread.h"
#include "stage.h"

namespace {

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
  Channels channels{task, plan};
  bool curved;  // the activation needs a block of z

  bool signs;   // the sign of y is all that backward will know of the residual: it has to be right, next to 0 too
  void* kept;   // where g is put while it is summed, to be read there by the next pass; null: it is computed once more

  explicit Work(const Task& given)
      : task(given),
        plan(given),
        curved(given.activation > relu_code),
        signs(sizeof(T) == sizeof(float) && given.extra != nullptr &&
              (given.activation == relu_code || given.activation == leaky_relu_code)),
        kept(place_of_g()) {}

  // The residual's gradient is g, and is read in place of dy and y where those come from memory once more. Without a residual g lies
  // where dx will, if its slope takes long to compute and is not rounded there.
  void* place_of_g() const {
    const bool exact = !curved || sizeof(T) == sizeof(S);
    if (task.dresidual != nullptr && exact && (curved || (!plan.fused && plan.stream))) return task.dresidual;
    return curved && exact ? task.out : nullptr;
  }

  Coefficients coefficients(int64_t g, int64_t column) const {
    const int64_t at = column * plan.column_width;
    return {plan.doubles_of(g) + at, plan.singles_of(g) + at, plan.wide};
  }

  bool in_doubles(int64_t g, int64_t column) const { return plan.doubles_only || !plan.scaled[g * plan.columns + column]; }
  bool summed_in_doubles(int64_t g, int64_t column) const { return plan.doubles_summed || in_doubles(g, column); }
  bool applied_in_doubles(int64_t g, int64_t column) const {
    return plan.doubles_only || !fuses || !plan.near[g * plan.columns + column];
  }

  // The shift: near the mean, so that the sums of squares keep their digits; a value of the channel where all are the same, so
  // that a constant channel has sums of exactly 0.
  void prepare_moments(int64_t g, int64_t panel) {
    const Span span = plan.span_of_panel(panel);
    double* shift = channels.doubles(g, mean_kind, span.first);
    for (int64_t i = 0; i < span.count; ++i) shift[i] = 0;
    if (first_valid[g] >= 0) add_first_values(g, span, shift);
    for (int64_t i = 0; i < span.count; ++i) shift[i] = std::fabs(shift[i]) < HUGE_VAL ? shift[i] : 0;
    channels.set_shift(g, panel);
  }

  void add_first_values(int64_t g, Span span, double* __restrict shift) const {
    constexpr int64_t enough = 8;
    const T* x = static_cast<const T*>(task.x);
    const int64_t n = first_valid[g] / task.positions, l = first_valid[g] % task.positions;
    const int64_t there = task.rows ? plan.samples_of(g) * task.positions : task.positions;
    const bool one = plan.doubles_summed || task.mask != nullptr || there < enough;
    const int64_t looked_at = one ? 1 : enough;
    constexpr int64_t together = 64;
    for (int64_t begin = 0; begin < span.count; begin += together) {
      const int64_t c = span.first + begin, size = std::min(together, span.count - begin);
      double sum[together], low[together], high[together];
      for (int64_t i = 0; i < size; ++i) sum[i] = 0, low[i] = HUGE_VAL, high[i] = -HUGE_VAL;
      const auto look = [&](int64_t i, double value) {
        sum[i] += value;
        low[i] = std::min(low[i], value);
        high[i] = std::max(high[i], value);
      };
      if (task.rows) {
        const T* row = x + first_valid[g] * task.channels + c;
        for (int64_t k = 0; k < looked_at; ++k)
          for (int64_t i = 0; i < size; ++i) look(i, widen(row[k * task.channels + i]));
      } else {
        const T* run = x + (n * task.channels + c) * task.positions + l;
        for (int64_t i = 0; i < size; ++i)
          for (int64_t k = 0; k < looked_at; ++k) look(i, widen(run[i * task.positions + k]));
      }
      for (int64_t i = 0; i < size; ++i) shift[begin + i] = one ? sum[i] : rounded(sum[i] / looked_at, high[i] - low[i]);
    }
  }

  // A shift with as many digits as a value would round all differences from it that are one binade above their values the same way,
  // which the mean of many shows. With few digits the roundings go both ways: it is a multiple of the spread's power of two over 4.
  static float rounded(double shift, double spread) {
    const double power = std::bit_cast<double>(std::bit_cast<uint64_t>(spread) & 0x7ff0000000000000u);
    const double at = power * 0x1.8p50;  // where doubles are such multiples
    return float((shift + at) - at);
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

  double* sums_of(int64_t g, int64_t column, int64_t chunk, int which) const {
    return plan.sums(plan.chunk_start[g] + chunk, which) + plan.span_of(column).first;
  }

  // Calls add(u, uv), which adds to the two sums of one unit.
  template <class Add>
  void with_sums(int64_t g, int64_t column, int64_t chunk, Spread& spread, const Add& add) {
    double *u = sums_of(g, column, chunk, 0), *uv = sums_of(g, column, chunk, 1);
    add(spread.cleared(0, u), spread.cleared(1, uv));
    spread.finish(0, u);
    spread.finish(1, uv);
  }

  void moment_sums(int64_t g, int64_t column, int64_t chunk, bool doubles) {
    Spread spread(plan, plan.span_of(column), coefficients(g, column));
    spread.fill(doubles, {mean_kind});
    const Coefficients k = spread.coefficients();
    Stage<T> stage(plan, false, doubles, summing);
    with_sums(g, column, chunk, spread, [&](double* u, double* uv) {
      stage.for_each_block(plan.unit(g, column, chunk), [&](const Unit& block) {
        const Runs x = stage.input(task.x, block, 0);
        const Tiles tiles = stage.tiles(block);
        with_types(stage.direct, doubles, [&]<class V, class E>(Types<V, E>) {
          with_plain<E>(task.mask == nullptr, [&](auto plain) {
            for (int t = 0; t < tiles.count; ++t) {
              const MomentTerms<E, plain()> terms{tiles.tile[t].extent, seen<E>(x, tiles.tile[t])};
              plan.rows ? wide_sums<V>(terms, k, u, uv) : narrow_sums<V>(terms, k, u, uv);
            }
          });
        });
      });
    });
  }

  // again(column, chunk) sums what is not good enough in float once more, in double.
  template <class Held, class Again>
  void merge_panel(int64_t g, int64_t panel, const Held& held, const Again& again) {
    channels.merge(g, plan.span_of_panel(panel));
    if (plan.doubles_summed) return;
    for (int64_t column = plan.first_column(panel); column < plan.first_column(panel + 1); ++column) {
      if (in_doubles(g, column) || held(column)) continue;
      plan.scaled[g * plan.columns + column] = false;
      for (int64_t chunk = 0; chunk < plan.chunk_start[g + 1] - plan.chunk_start[g]; ++chunk) again(column, chunk);
      channels.merge(g, plan.span_of(column));
    }
  }

  void finish_moments(int64_t g, int64_t panel, bool apply) {
    merge_panel(
        g, panel, [&](int64_t column) { return channels.moments_held(g, column); },
        [&](int64_t column, int64_t chunk) { moment_sums(g, column, chunk, true); });
    channels.finish_moments(g, panel, apply);
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

  // Half precision and double have no loops of their own for plain blocks: these would take as long again to compile.
  template <class E, class F>
  static void with_plain(bool flag, F&& work) {
    if constexpr (std::is_same_v<E, float>)
      if (flag) return work(std::true_type{});
    work(std::false_type{});
  }

  // Returns whether some sign is in doubt; see `normalize_block`.
  bool normalize_any(const Tiles& tiles, Runs x, Runs residual, Runs y, const Coefficients& k, bool relu, bool direct,
                     bool doubles) {
    bool doubtful = false;
    with_types(direct, doubles, [&]<class V, class E>(Types<V, E>) {
      with_flag(plan.rows, [&](auto wide) {
        with_flag(residual.data != nullptr, [&](auto with_residual) {
          with_plain<E>(task.mask == nullptr, [&](auto plain) {
            for (int t = 0; t < tiles.count; ++t) {
              const Tile& tile = tiles.tile[t];
              doubtful |= normalize_block<V, E, wide(), with_residual(), plain()>(
                  tile.extent, seen<E>(x, tile), seen<E>(residual, tile), seen<E>(y, tile), relu, k);
            }
          });
        });
      });
    });
    return doubtful;
  }

  static void fill_apply(Spread& spread, bool doubles) {
    if (doubles) spread.fill(true, {mean_kind, scale_kind, bias_kind});
    else spread.fill(false, {scale_kind, scale_rest_kind, bias_kind});
  }

  void apply(int64_t g, int64_t column, int64_t chunk) {
    const bool doubles = applied_in_doubles(g, column);
    if (apply(g, column, chunk, doubles) && signs) apply(g, column, chunk, true);
    if (plan.stream) finish_streams();
  }

  // Returns whether some sign is in doubt.
  bool apply(int64_t g, int64_t column, int64_t chunk, bool doubles) {
    bool doubtful = false;
    Spread spread(plan, plan.span_of(column), coefficients(g, column));
    fill_apply(spread, doubles);
    const Coefficients k = spread.coefficients();
    Stage<T> stage(plan, curved, doubles);
    stage.for_each_block(plan.unit(g, column, chunk), [&](const Unit& block) {
      const Runs x = stage.input(task.x, block, 0);
      const Runs residual = task.extra == nullptr ? Runs{} : stage.input(task.extra, block, 1);
      const Runs y = stage.output(task.out, block, 2);
      doubtful |= normalize_any(stage.tiles(block), x, residual, y, k, task.activation == relu_code, stage.direct, doubles);
      if (curved) {
        for_each_run(block, y.stride == block.width, [&](int64_t r, int64_t count) {
          curve<S>(task.activation).value(y.row<S>(r), count, S(task.parameter), next_of(stage, block, r, task.extra));
        });
        stage.clear_invalid(y, block);
      }
      stage.finish_output(task.out, block, 2);
    });
    return doubtful;
  }

  template <class F>
  static void for_each_run(const Unit& block, bool joined, const F& run) {
    if (joined) return run(0, block.rows * block.width);
    for (int64_t r = 0; r < block.rows; ++r) run(r, block.width);
  }

  // x and another operand of the next block.
  Next next_of(const Stage<T>& stage, const Unit& block, int64_t r, const void* other) const {
    return {stage.next_row(task.x, block, r), stage.next_row(other, block, r)};
  }

  // The operands of backward over one block. Where the activation is curved, z is rebuilt in a buffer and g replaces dy.
  struct Gradient {
    Runs g, x, saved;
    Gate gate;
  };

  Gradient gradient_of(Stage<T>& stage, const Unit& block, const Coefficients& k, bool doubles, Runs place) {
    const Runs x = stage.input(task.x, block, 0), dy = stage.input(task.dy, block, 1);
    const Runs saved = task.extra == nullptr ? Runs{} : stage.input(task.extra, block, 2);
    if (!curved) {
      const Gate with_relu = saved.data == nullptr ? Gate::input : Gate::output;
      return {dy, x, saved, task.activation == relu_code ? with_relu : Gate::none};
    }
    const Runs z{stage.buffer[3], block.width}, g = place.data != nullptr ? place : Runs{stage.buffer[4], block.width};
    if (!task.extra_is_output) normalize_any(stage.tiles(block), x, saved, z, k, false, stage.direct, doubles);
    const Runs seen = task.extra_is_output ? saved : z;
    const bool joined = seen.stride == block.width && dy.stride == block.width && g.stride == block.width;
    for_each_run(block, joined, [&](int64_t r, int64_t count) {
      curve<S>(task.activation).slope(seen.row<S>(r), dy.row<S>(r), g.row<S>(r), count, S(task.parameter),
                                      next_of(stage, block, r, task.dy));
    });
    if (task.dresidual != nullptr) stage.clear_invalid(g, block);
    return {g, x, {}, Gate::none};
  }

  Gradient kept_gradient(Stage<T>& stage, const Unit& block) const {
    const Runs g = kept == task.out ? stage.replaced_input(kept, block, 4) : stage.input(kept, block, 4);
    return {g, stage.input(task.x, block, 0), {}, Gate::none};
  }

  template <class F>
  static void with_gate(Gate gate, F&& work) {
    switch (gate) {
      case Gate::none: return work(std::integral_constant<Gate, Gate::none>{});
      case Gate::input: return work(std::integral_constant<Gate, Gate::input>{});
      case Gate::output: return work(std::integral_constant<Gate, Gate::output>{});
    }
  }

  void gradient_sums(int64_t g, int64_t column, int64_t chunk) {
    gradient_sums(g, column, chunk, summed_in_doubles(g, column), kept);
  }
  void gradient_sums(int64_t g, int64_t column, int64_t chunk, bool doubles, void* keep) {
    Spread spread(plan, plan.span_of(column), coefficients(g, column));
    spread.fill(doubles, {mean_kind});
    fill_slope(spread, g, column, doubles);
    const Coefficients k = spread.coefficients();
    Stage<T> stage(plan, curved, doubles, summing);
    with_sums(g, column, chunk, spread, [&](double* u, double* uv) {
      stage.for_each_block(plan.unit(g, column, chunk), [&](const Unit& block) {
        const Runs place = keep == nullptr ? Runs{} : stage.output(keep, block, 4);
        const Gradient given = gradient_of(stage, block, k, applied_in_doubles(g, column), place);
        const Tiles tiles = stage.tiles(block);
        with_types(stage.direct, doubles, [&]<class V, class E>(Types<V, E>) {
          with_gate(given.gate, [&](auto gate) {
            with_plain<E>(task.mask == nullptr && (curved || place.data == nullptr), [&](auto plain) {
              for (int t = 0; t < tiles.count; ++t) {
                const Tile& tile = tiles.tile[t];
                const GradientTerms<gate(), E, plain()> terms{tile.extent, seen<E>(given.g, tile), seen<E>(given.x, tile),
                                                              seen<E>(given.saved, tile), seen<E>(curved ? Runs{} : place, tile)};
                plan.rows ? wide_sums<V>(terms, k, u, uv) : narrow_sums<V>(terms, k, u, uv);
              }
            });
          });
        });
        if (keep != nullptr) stage.finish_output(keep, block, 4);
      });
    });
    if (plan.stream) finish_streams();
  }

  // What tells the activation's slope: the ReLU's bounds, or what z is made of.
  void fill_slope(Spread& spread, int64_t g, int64_t column, bool doubles) const {
    if (curved && !task.extra_is_output) fill_apply(spread, applied_in_doubles(g, column));
    if (task.activation != relu_code || task.extra != nullptr) return;
    spread.fill(doubles, {low_kind, high_kind});
    if (doubles && !plan.doubles_only) spread.fill(false, {low_kind, high_kind});  // see `gate_t`
  }

  // `apply`: `gradient` follows. Else g has been read where it was kept, and dx may lie there by now.
  void finish_gradient_sums(int64_t g, int64_t panel, bool apply) {
    merge_panel(
        g, panel, [&](int64_t column) { return channels.gradient_sums_held(g, column); },
        [&](int64_t column, int64_t chunk) { gradient_sums(g, column, chunk, true, apply ? kept : nullptr); });
    channels.finish_gradient_sums(g, panel, apply);
  }

  // `summed`: after `gradient_sums`, which may have kept g.
  void gradient(int64_t g, int64_t column, int64_t chunk, bool centred, bool summed) {
    const bool is_kept = summed && kept != nullptr;
    void* const dresidual = is_kept ? nullptr : task.dresidual;
    const bool doubles = plan.doubles_moved || in_doubles(g, column);
    Spread spread(plan, plan.span_of(column), coefficients(g, column));
    if (!is_kept) fill_slope(spread, g, column, doubles);
    spread.fill(doubles, {scale_kind});
    if (!doubles) spread.fill(false, {scale_rest_kind});
    if (centred) spread.fill(doubles, {mean_kind, offset_kind, slope_kind});
    if (centred && !doubles) spread.fill(false, {slope_rest_kind});
    const Coefficients k = spread.coefficients();
    Stage<T> stage(plan, curved, doubles);
    stage.for_each_block(plan.unit(g, column, chunk), [&](const Unit& block) {
      const Gradient given = is_kept ? kept_gradient(stage, block) : gradient_of(stage, block, k, applied_in_doubles(g, column), {});
      const Runs dx = stage.output(task.out, block, 3);
      const Runs passed = dresidual == nullptr ? Runs{} : stage.output(dresidual, block, 5);
      gradient_any(stage.tiles(block), given, k, dx, passed, centred, stage.direct, doubles);
      stage.finish_output(task.out, block, 3);
      if (dresidual != nullptr) stage.finish_output(dresidual, block, 5);
    });
    if (plan.stream) finish_streams();
  }

  void gradient_any(const Tiles& tiles, const Gradient& given, const Coefficients& k, Runs dx, Runs dresidual, bool centred,
                    bool direct, bool doubles) {
    with_types(direct, doubles, [&]<class V, class E>(Types<V, E>) {
      with_flag(plan.rows, [&](auto wide) {
        with_gate(given.gate, [&](auto gate) {
          with_plain<E>(task.mask == nullptr && centred && (dresidual.data != nullptr) == (gate() == Gate::output), [&](auto plain) {
            for (int t = 0; t < tiles.count; ++t) {
              const Tile& tile = tiles.tile[t];
              gradient_block<V, E, wide(), gate(), plain()>(tile.extent, seen<E>(given.g, tile), seen<E>(given.x, tile),
                                                            seen<E>(given.saved, tile), seen<E>(dx, tile), seen<E>(dresidual, tile),
                                                            centred, k);
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
    const int64_t count = plan.chunks() * plan.columns;
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
      const int64_t chunk = unit / plan.columns, g = plan.group_of(chunk);
      work(g, unit % plan.columns, chunk - plan.chunk_start[g]);
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

  // All phases of an operation: coefficients, sums, merge, apply; each is a function of (group, panel) or of (group, column,
  // chunk), or Nothing.
  template <class Prepare, class Sums, class Finish, class Apply>
  void phases(Prepare prepare, Sums sums, Finish finish, Apply apply) {
    if (plan.fused) {
      for_each_panel([&](int64_t g, int64_t panel) {
        const int64_t chunks = plan.chunk_start[g + 1] - plan.chunk_start[g];
        const int64_t first = plan.first_column(panel), last = plan.first_column(panel + 1);
        prepare(g, panel);
        for (int64_t column = first; column < last; ++column)
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sums(g, column, chunk);
        finish(g, panel);
        for (int64_t column = first; column < last; ++column)
          for (int64_t chunk = chunks; chunk-- > 0;) apply(g, column, chunk);
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
