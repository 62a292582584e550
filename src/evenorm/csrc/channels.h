// What is done once for each channel: its sums merged, its mean and deviation, its coefficients.
//
// A table holds numbers of one kind for consecutive channels side by side, so each step is a plain loop over a panel's channels
// that becomes vectors: one channel after the other, with a root and a division each, a small layer spent a fifth of its time here.
#pragma once

#include <cmath>
#include <initializer_list>

#include "activations.h"
#include "plan.h"

namespace {

using evenorm::Type;
using evenorm::Values;

template <class From>
void widen_values(const Values& values, int64_t at, int64_t count, double* __restrict to) {
  const From* from = static_cast<const From*>(values.data) + at;
  const int64_t stride = values.channel_stride;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
  }
}

// Those of the channels in the span; `otherwise` where there are none.
inline void load_values(const Values& values, int64_t g, Span span, double otherwise, double* to) {
  if (values.data == nullptr) {
    for (int64_t i = 0; i < span.count; ++i) to[i] = otherwise;
    return;
  }
  const int64_t at = g * values.group_stride + span.first * values.channel_stride;
  switch (values.type) {
    case Type::float32: return widen_values<float>(values, at, span.count, to);
    case Type::float64: return widen_values<double>(values, at, span.count, to);
    case Type::bfloat16: return widen_values<bfloat16>(values, at, span.count, to);
    case Type::float16: return widen_values<float16>(values, at, span.count, to);
  }
}

// The next number above, by selections alone, which a loop can do in vectors; std::nextafter is a call.
template <class Number, class Bits>
[[gnu::always_inline]] inline Number next_above(Number value) {
  const Bits bits = std::bit_cast<Bits>(value);
  const Bits next = value > 0 ? bits + 1 : value < 0 ? bits - 1 : 1;
  return value < Number(HUGE_VAL) ? std::bit_cast<Number>(next) : value;
}
[[gnu::always_inline]] inline double above(double value) { return next_above<double, int64_t>(value); }

// Rounded to float, never downwards.
[[gnu::always_inline]] inline float rounded_up(double value) {
  const float near = float(value);
  return double(near) < value ? next_above<float, int32_t>(near) : near;
}

// Neither it nor its product with another such number leaves float's range.
constexpr auto fits = [](double value) {
  const double size = std::fabs(value);
  return (size < 1e15) & ((size > 1e-15) | (value == 0));
};

struct Channels {
  const Task& task;
  const Plan& plan;

  double* doubles(int64_t g, Kind kind, int64_t c) const { return plan.doubles_of(g) + kind * plan.wide + c; }
  float* singles(int64_t g, Kind kind, int64_t c) const { return plan.singles_of(g) + kind * plan.wide + c; }
  double* inverses(int64_t g, int64_t c) const { return plan.inverse + g * plan.wide + c; }
  double* sums(int which, int64_t g, int64_t c) const { return task.sums[which] + g * task.channels + c; }

  // Does not stop at the first that fails, or it would be no vectors.
  template <class Test>
  static bool all(Span span, const Test& test) {
    int passed = 1;
    for (int64_t i = 0; i < span.count; ++i) passed &= int(test(i));
    return passed != 0;
  }

  double share_of(int64_t g) const {
    return task.var_count == nullptr ? 1 : 1 / (task.var_count[g] > 0 ? task.var_count[g] : 1);
  }

  // Few channels are computed `repeat` rows at a time, as one wide row; they are a single panel then.
  void repeat(int64_t g, std::initializer_list<Kind> written) const {
    if (plan.repeat == 1) return;
    for (const Kind kind : written) {
      repeat_to(doubles(g, kind, 0), task.channels, plan.wide);
      if (!plan.doubles_only) repeat_to(singles(g, kind, 0), task.channels, plan.wide);
    }
  }

  void set_shift(int64_t g, int64_t panel) const {
    const Span span = plan.span_of_panel(panel);
    const double* shift = doubles(g, mean_kind, span.first);
    if (!plan.doubles_only) {
      float* single = singles(g, mean_kind, span.first);
      for (int64_t i = 0; i < span.count; ++i) single[i] = float(shift[i]);
    }
    repeat(g, {mean_kind});
    judge(g, panel, [](double value) { return std::fabs(value) < 1e30; }, {mean_kind});
  }

  // Whether float is good enough for each column, told by these kinds of all of its channels; unless anew, only if it was before.
  template <class Test>
  void judge(int64_t g, int64_t panel, const Test& test, std::initializer_list<Kind> told_by, bool anew = true) const {
    if (plan.doubles_only) return;
    for (int64_t column = plan.first_column(panel); column < plan.first_column(panel + 1); ++column) {
      const Span one = plan.span_of(column);
      uint8_t& scaled = plan.scaled[g * plan.columns + column];
      if (anew) scaled = 1;
      for (const Kind kind : told_by) {
        const double* row = doubles(g, kind, one.first);
        scaled &= uint8_t(all(one, [&](int64_t i) { return test(row[i]); }));
      }
    }
  }

  // What y takes, from the mean and from var / share, which stands where its inverse deviation will.
  void set_apply(int64_t g, int64_t panel, double share) const {
    const Span span = plan.span_of_panel(panel);
    const int64_t c = span.first, count = span.count;
    double* __restrict inverse = inverses(g, c);
    double* __restrict scale = doubles(g, scale_kind, c);
    double* __restrict margin = doubles(g, margin_kind, c);
    const double* mean = doubles(g, mean_kind, c);
    load_values(task.weight, g, span, 1, scale);
    load_values(task.bias, g, span, 0, doubles(g, bias_kind, c));
    const double eps = task.eps;
    for (int64_t i = 0; i < count; ++i) {
      const double var = inverse[i] * share;
      margin[i] = var - mean[i] * mean[i];
      inverse[i] = 1 / std::sqrt(var + eps);
      scale[i] *= inverse[i];
    }
    if (!plan.doubles_only) round_apply(g, span);
    repeat(g, {mean_kind, scale_kind, bias_kind, scale_rest_kind});
    judge(g, panel, fits, {mean_kind, scale_kind, bias_kind});
    if (plan.doubles_only) return;
    for (int64_t column = plan.first_column(panel); column < plan.first_column(panel + 1); ++column) {
      const Span one = plan.span_of(column);
      const double* above_mean = doubles(g, margin_kind, one.first);
      const int64_t at = g * plan.columns + column;
      plan.near[at] = plan.scaled[at] & uint8_t(all(one, [&](int64_t i) { return above_mean[i] >= 0; }));
    }
  }

  void round_apply(int64_t g, Span span) const {
    const int64_t c = span.first;
    const double *mean = doubles(g, mean_kind, c), *scale = doubles(g, scale_kind, c), *bias = doubles(g, bias_kind, c);
    float* __restrict means = singles(g, mean_kind, c);
    float* __restrict scales = singles(g, scale_kind, c);
    float* __restrict rests = singles(g, scale_rest_kind, c);
    float* __restrict biases = singles(g, bias_kind, c);
    for (int64_t i = 0; i < span.count; ++i) {
      means[i] = float(mean[i]);
      scales[i] = float(scale[i]);
      rests[i] = float(scale[i] - float(scale[i]));
      biases[i] = float(bias[i] - mean[i] * scale[i]);
    }
  }

  // z = (x - mean) * scale + bias <= 0 between these. Rounded towards the inside for float, in which x is exact, so that no
  // element's sign depends on how z would have been rounded.
  void set_bounds(int64_t g, Span span) const {
    const int64_t c = span.first;
    const double *mean = doubles(g, mean_kind, c), *scale = doubles(g, scale_kind, c), *bias = doubles(g, bias_kind, c);
    double* __restrict low = doubles(g, low_kind, c);
    double* __restrict high = doubles(g, high_kind, c);
    for (int64_t i = 0; i < span.count; ++i) {
      const double there = mean[i] - bias[i] / scale[i];
      const bool stuck = (there == mean[i]) & (bias[i] != 0), below = (bias[i] > 0) == (scale[i] > 0);
      const double beside = below ? -above(-mean[i]) : above(mean[i]);
      const double zero = stuck ? beside : there;
      const bool nowhere = scale[i] == 0 ? !(bias[i] <= 0) : zero != zero;  // no x compares with NaN
      low[i] = nowhere ? double(NAN) : scale[i] < 0 ? zero : -HUGE_VAL;
      high[i] = scale[i] > 0 ? zero : HUGE_VAL;
    }
    if (!plan.doubles_only) {
      float* __restrict lows = singles(g, low_kind, c);
      float* __restrict highs = singles(g, high_kind, c);
      for (int64_t i = 0; i < span.count; ++i) {
        lows[i] = rounded_up(low[i]);
        highs[i] = -rounded_up(-high[i]);
      }
    }
    repeat(g, {low_kind, high_kind});
  }

  // What dx takes beside, from offset and slope in their rows.
  void set_slope(int64_t g, int64_t panel) const {
    if (!plan.doubles_only) {
      const Span span = plan.span_of_panel(panel);
      const int64_t c = span.first;
      const double *mean = doubles(g, mean_kind, c), *offset = doubles(g, offset_kind, c), *slope = doubles(g, slope_kind, c);
      float* __restrict offsets = singles(g, offset_kind, c);
      float* __restrict slopes = singles(g, slope_kind, c);
      float* __restrict rests = singles(g, slope_rest_kind, c);
      for (int64_t i = 0; i < span.count; ++i) {
        offsets[i] = float(offset[i] - (mean[i] - float(mean[i])) * slope[i]);
        slopes[i] = float(slope[i]);
        rests[i] = float(slope[i] - float(slope[i]));
      }
    }
    repeat(g, {offset_kind, slope_kind, slope_rest_kind});
    judge(g, panel, fits, {offset_kind, slope_kind}, false);
  }

  void prepare_apply(int64_t g, int64_t panel) const {
    const Span span = plan.span_of_panel(panel);
    load_values(task.mean, g, span, 0, doubles(g, mean_kind, span.first));
    load_values(task.var, g, span, 0, inverses(g, span.first));
    set_apply(g, panel, share_of(g));
  }

  void prepare_gradient(int64_t g, int64_t panel) const {
    const Span span = plan.span_of_panel(panel);
    prepare_apply(g, panel);
    if (task.activation == relu_code && task.extra == nullptr) set_bounds(g, span);
    if (task.offset.data == nullptr) return;
    const double* inverse = inverses(g, span.first);
    double* __restrict slope = doubles(g, slope_kind, span.first);
    load_values(task.offset, g, span, 0, doubles(g, offset_kind, span.first));
    load_values(task.slope, g, span, 0, slope);
    for (int64_t i = 0; i < span.count; ++i) slope[i] *= inverse[i];
    set_slope(g, panel);
  }

  // The sums of the chunks, added in their order.
  void merge(int64_t g, Span span) const {
    for (int which = 0; which < 2; ++which) {
      double* __restrict sum = sums(which, g, span.first);
      for (int64_t i = 0; i < span.count; ++i) sum[i] = 0;
      for (int64_t chunk = plan.chunk_start[g]; chunk < plan.chunk_start[g + 1]; ++chunk)
        for (int64_t r = 0; r < plan.repeat; ++r) {
          const double* more = plan.sums(chunk, which) + r * task.channels + span.first;
          for (int64_t i = 0; i < span.count; ++i) sum[i] += more[i];
        }
    }
  }

  // Where this is false for sums in float, all is summed once more, in double: squares that left its range, a shift so far from the
  // mean that the squares' digits cancel, or numbers that are not finite.
  bool moments_held(int64_t g, int64_t column) const {
    const Span span = plan.span_of(column);
    const double share = 1 / (task.count[g] > 0 ? task.count[g] : 1);
    const double *sums_u = sums(0, g, span.first), *sums_uu = sums(1, g, span.first);
    return all(span, [&](int64_t i) {
      const double away = sums_u[i] * sums_u[i] * share, m2 = sums_uu[i] - away;
      return (m2 * share > 1e-25) & (m2 * share < 1e25) & (away < 16 * m2);
    });
  }

  bool gradient_sums_held(int64_t g, int64_t column) const {
    const Span span = plan.span_of(column);
    const double *sums_g = sums(0, g, span.first), *sums_g_x = sums(1, g, span.first);
    const auto whole = [](double sum) {
      const double size = std::fabs(sum);
      return (sum == 0) | ((size > 1e-20) & (size < 1e30));
    };
    return all(span, [&](int64_t i) { return whole(sums_g[i]) & whole(sums_g_x[i]); });
  }

  // The sums become mean and m2.
  void finish_moments(int64_t g, int64_t panel, bool apply) const {
    const Span span = plan.span_of_panel(panel);
    const double share = 1 / (task.count[g] > 0 ? task.count[g] : 1);
    double* __restrict mean = sums(0, g, span.first);
    double* __restrict m2 = sums(1, g, span.first);
    double* __restrict shift = doubles(g, mean_kind, span.first);
    double* __restrict inverse = inverses(g, span.first);
    for (int64_t i = 0; i < span.count; ++i) {
      const double sum = mean[i], step = sum * share, left = m2[i] - sum * step;
      shift[i] += step;
      mean[i] = shift[i];
      m2[i] = left < 0 ? 0 : left;
      inverse[i] = m2[i];
    }
    if (apply) set_apply(g, panel, share);
  }

  // The second sum is of g * (x - mean), the mean rounded where it was taken in float.
  void finish_gradient_sums(int64_t g, int64_t panel, bool apply) const {
    const Span span = plan.span_of_panel(panel);
    const double *mean = doubles(g, mean_kind, 0), *inverse = inverses(g, 0);
    double *sum_g = sums(0, g, 0), *sum_g_xhat = sums(1, g, 0);
    const int64_t last = span.first + span.count;
    if (!plan.doubles_summed)
      for (int64_t column = plan.first_column(panel); column < plan.first_column(panel + 1); ++column) {
        if (!plan.scaled[g * plan.columns + column]) continue;
        const Span one = plan.span_of(column);
        for (int64_t c = one.first; c < one.first + one.count; ++c) sum_g_xhat[c] -= (mean[c] - float(mean[c])) * sum_g[c];
      }
    for (int64_t c = span.first; c < last; ++c) sum_g_xhat[c] *= inverse[c];
    if (!apply) return;
    const double share = share_of(g);
    double* __restrict offset = doubles(g, offset_kind, 0);
    double* __restrict slope = doubles(g, slope_kind, 0);
    for (int64_t c = span.first; c < last; ++c) {
      offset[c] = sum_g[c] * share;
      slope[c] = sum_g_xhat[c] * share * inverse[c];
    }
    set_slope(g, panel);
  }
};

}  // namespace
