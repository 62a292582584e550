// The arithmetic of batch norm over one block: `rows` runs of `width` elements, `stride` elements apart.
//
// `wide` says where the coefficients come from: one for the whole block (planes: a run belongs to one channel), or one for each
// element of a run (rows: a run is a row of channels). There is no other difference between the layouts.
//
//   z = (x - mean) * scale + bias + residual                       scale = weight / sqrt(var + eps)
//   dx = scale * (g - offset - slope * (x - mean))                 slope = (sum of g * xhat) / count / sqrt(var + eps)
//
// In double x is centred before it is scaled: x - mean is exact to the last bit of x when the offset is large, x * scale is not.
// In float z is x * scale + (bias - mean * scale), whose rounding shows only where the mean is further from 0 than the deviation;
// there, and where processors do not fuse products and sums, z is computed in double (math.md, eq. 23).
//
// E is the type in memory, V the vector that is computed in. For Singles the coefficients are in float: the mean is rounded, and
// what that leaves, less than a unit in x's last place, is in bias and offset.
#pragma once

#include "numbers.h"

namespace {

// low, high: where the ReLU is flat, z <= 0 there and nowhere else, as exact bounds on x.
// The rests are what rounding to float left of scale and slope. In float bias is bias - mean * scale. margin: var - mean^2.
enum Kind {
  mean_kind, scale_kind, bias_kind, offset_kind, slope_kind, low_kind, high_kind, scale_rest_kind, slope_rest_kind, margin_kind, kinds
};

// (kinds, wide): `pitch` from one kind to the next.
struct Coefficients {
  const double* doubles;
  const float* singles;
  int64_t pitch;

  template <class Lane>
  [[gnu::always_inline]] const Lane* of(Kind kind) const {
    if constexpr (sizeof(Lane) == sizeof(double)) {
      return doubles + kind * pitch;
    } else {
      return singles + kind * pitch;
    }
  }
};

// In what a gate is looked at: in float, which has half as much to compare, where that is how memory holds it.
template <class V, class E>
using gate_t = std::conditional_t<std::is_same_v<V, Doubles> && std::is_same_v<E, float>, Floats, V>;

// The coefficients of the elements from i on, in registers.
template <class V, class E>
struct Held {
  V mean, scale, bias, offset, slope;
  gate_t<V, E> low, high;
  V scale_rest, slope_rest;
};

template <class V, bool wide>
[[gnu::always_inline]] inline V held_value(const Coefficients& k, Kind kind, int64_t i) {
  const lane_t<V>* values = k.of<lane_t<V>>(kind);
  if constexpr (wide) {
    return load<V>(values + i);
  } else {
    return splat<V>(*values);
  }
}

template <class V, class E, bool wide>
[[gnu::always_inline]] inline Held<V, E> hold(const Coefficients& k, int64_t i) {
  using W = gate_t<V, E>;
  return {held_value<V, wide>(k, mean_kind, i),       held_value<V, wide>(k, scale_kind, i),
          held_value<V, wide>(k, bias_kind, i),       held_value<V, wide>(k, offset_kind, i),
          held_value<V, wide>(k, slope_kind, i),      held_value<W, wide>(k, low_kind, i),
          held_value<W, wide>(k, high_kind, i),       held_value<V, wide>(k, scale_rest_kind, i),
          held_value<V, wide>(k, slope_rest_kind, i)};
}

template <class V, class E, class All>
[[gnu::always_inline]] inline Held<V, E> first_lane(const Held<All, E>& all) {
  if constexpr (Parts<V>::count == 1) {
    return {all.mean[0], all.scale[0], all.bias[0],       all.offset[0],    all.slope[0],
            all.low[0],  all.high[0],  all.scale_rest[0], all.slope_rest[0]};
  } else {
    return all;
  }
}

struct Runs {
  void* data = nullptr;
  int64_t stride = 0;
  template <class E>
  [[gnu::always_inline]] E* row(int64_t r) const {
    return static_cast<E*>(data) + r * stride;
  }
};

struct Extent {
  int64_t rows, width;
  int64_t ahead = 0;    // from each vector to what is fetched meanwhile; 0: nothing
  bool stream = false;  // write past the caches; all runs begin and end on a cache line then
  bool apart = false;   // its rows are parts of longer ones
  const uint8_t* valid = nullptr;  // whether an element counts; null: all do
  int64_t valid_stride = 0;        // from run to run

  template <bool plain, class V>
  [[gnu::always_inline]] V if_valid(int64_t r, int64_t i, V value) const {
    return plain || valid == nullptr ? value : chosen(valid + r * valid_stride + i, value, V{});
  }
};

// What is read next, into the level 2 cache: the processor fetches little ahead by itself of runs that are a few KB long and far
// apart, and of the many runs that a wide block is to it; and beside the rows in use the level 1 cache has no room.
template <class... E>
[[gnu::always_inline]] inline void fetch_beyond(int64_t ahead, const E*... at) {
  if (ahead != 0) (__builtin_prefetch(at + ahead, 0, 2), ...);
}

// A whole run, all at once: while short ones are gathered there is nothing to compute.
template <class E>
[[gnu::always_inline]] inline void fetch_run(const E* run, int64_t width) {
  const char* from = reinterpret_cast<const char*>(run);
  for (int64_t at = 0; at < width * int64_t(sizeof(E)); at += 64) __builtin_prefetch(from + at);
}

// Vectors of V that are computed together: where E is narrow they share a cache line, which is not found there any more after some
// other rows whose distance is a power of two.
template <class V, class E>
constexpr int side_by_side = Parts<V>::count * sizeof(E) < 64 ? 2 : 1;

// body(V, r, i, held) for each element of the block, V the vector or, at the end of a run, its lane. Of wide blocks some rows are
// done together, so that a coefficient is loaded once for all of them; of narrow ones it stays in its register throughout.
template <class All, class E, bool wide, class Body>
[[gnu::always_inline]] inline void for_each_vector(Extent extent, const Coefficients& k, const Body& body) {
  constexpr int64_t together = wide ? 4 : 1, count = Parts<All>::count;
  const Held<All, E> all = hold<All, E, false>(k, 0);
  const auto some_rows = [&](int64_t first, int64_t many) __attribute__((always_inline)) {
    const int64_t rows = wide ? many : 1;
    const auto column = [&]<class V>(V, int64_t i) __attribute__((always_inline)) {
      Held<V, E> held;
      if constexpr (wide) {
        held = hold<V, E, true>(k, i);
      } else {
        held = first_lane<V, E>(all);
      }
      for (int64_t r = 0; r < rows; ++r) body(V{}, first + r, i, held);
    };
    int64_t i = 0;
    if constexpr (!wide) {
      for (; i + 2 * count <= extent.width; i += 2 * count) {
        column(All{}, i);
        column(All{}, i + count);
      }
    } else if constexpr (side_by_side<All, E> == 2) {
      for (; i + 2 * count <= extent.width; i += 2 * count) {
        const Held<All, E> left = hold<All, E, true>(k, i), right = hold<All, E, true>(k, i + count);
        for (int64_t r = 0; r < rows; ++r) {
          body(All{}, first + r, i, left);
          body(All{}, first + r, i + count, right);
        }
      }
    }
    for (; i + count <= extent.width; i += count) column(All{}, i);
    const bool again = extent.width >= count && !extent.stream;  // some of it once more
    if (i < extent.width && again) return column(All{}, extent.width - count);
    for (; i < extent.width; ++i) column(lane_t<All>{}, i);
  };
  for (int64_t r = 0; r < extent.rows; r += together) some_rows(r, extent.rows - r < together ? extent.rows - r : together);
}

enum class Gate { none, input, output };  // the ReLU's gate: none, the sign of z told by x, the sign of the saved y

template <class V>
[[gnu::always_inline]] inline V positive_part(V z) {
  return z <= V{} ? V{} : z;  // NaN stays NaN
}

template <class V, Gate gate, class E>
[[gnu::always_inline]] inline V gated(const E* dy, const E* x, const E* saved, const Held<V, E>& k) {
  using W = gate_t<V, E>;
  W g = load<W>(dy);
  if constexpr (gate == Gate::output) {
    g = load<W>(saved) <= W{} ? W{} : g;
  } else if constexpr (gate == Gate::input) {
    const W value = load<W>(x);
    g = ((value >= k.low) & (value <= k.high)) ? W{} : g;
  }
  if constexpr (std::is_same_v<V, W>) return g;
  else return widened(g);
}

template <class V>
constexpr bool in_double = sizeof(lane_t<V>) == sizeof(double);

// Written in half precision, whose own rounding is thousands of times that of a coefficient.
template <class E>
constexpr bool is_half = sizeof(E) < sizeof(float);

// A block is `plain` where all of its elements count, and it yields y, or sums, or a centred dx, with the residual's gradient where a
// saved y is the gate: its loops ask for nothing else, since asking costs as much as the arithmetic. They are not inlined either: side
// by side, GCC keeps their sums in memory.

// Returns whether rounding in float may have given some z beside a residual the wrong sign (math.md, eq. 24).
template <class V, class E, bool wide, bool residual, bool plain>
[[gnu::noinline]] bool normalize_block(Extent extent, Runs xs, Runs residuals, Runs ys, bool relu, const Coefficients& k) {
  constexpr bool doubts = residual && sizeof(E) == sizeof(float) && !in_double<V>;
  Flags doubtful;
  const auto body = [&]<class U>(U, int64_t r, int64_t i, const Held<U, E>& held) __attribute__((always_inline)) {
    fetch_beyond(extent.ahead, xs.row<E>(r) + i);
    if constexpr (residual) fetch_beyond(extent.ahead, residuals.row<E>(r) + i);
    const U x = load<U>(xs.row<E>(r) + i);
    U z;
    if constexpr (in_double<U>) z = (x - held.mean) * held.scale + held.bias;
    else if constexpr (is_half<E>) z = x * held.scale + held.bias;
    else z = x * held.scale + (finite(x) * held.scale_rest + held.bias);  // an infinite x has no rest
    if constexpr (residual) {
      const U added = load<U>(residuals.row<E>(r) + i);
      z += added;
      if constexpr (doubts) doubtful.note(size_of(z) <= 0x1p-22f * (size_of(added) + size_of(held.bias)));
    }
    put(extent.if_valid<plain>(r, i, relu ? positive_part(z) : z), ys.row<E>(r) + i, extent.stream);
  };
  for_each_vector<V, E, wide>(extent, k, body);
  return doubts && doubtful.any();
}

// value * (factor + rest) + term: in float the factor's own rounding would cost half as much again as the arithmetic does.
template <class E, class V>
[[gnu::always_inline]] inline V product(V value, V factor, V rest, V term) {
  if constexpr (in_double<V> || is_half<E>) return value * factor + term;
  return value * factor + (value * rest + term);
}

template <class V, class E, bool wide, Gate gate, bool plain>
[[gnu::noinline]] void gradient_block(Extent extent, Runs dys, Runs xs, Runs saveds, Runs dxs, Runs dresiduals, bool centred,
                                      const Coefficients& k) {
  const bool residual = plain ? gate == Gate::output : dresiduals.data != nullptr;
  const auto body = [&]<class U>(U, int64_t r, int64_t i, const Held<U, E>& held) __attribute__((always_inline)) {
    const E *x = xs.row<E>(r) + i, *dy = dys.row<E>(r) + i, *saved = gate == Gate::output ? saveds.row<E>(r) + i : nullptr;
    fetch_beyond(extent.ahead, x, dy);
    if constexpr (gate == Gate::output) fetch_beyond(extent.ahead, saved);
    const U passed = gated<U, gate>(dy, x, saved, held);
    const U g = extent.if_valid<plain>(r, i, passed);
    if (residual) put(g, dresiduals.row<E>(r) + i, extent.stream);
    U inner = g;
    if (plain || centred) inner = g - product<E>(load<U>(x) - held.mean, held.slope, held.slope_rest, held.offset);
    put(extent.if_valid<plain>(r, i, product<E>(inner, held.scale, held.scale_rest, U{})), dxs.row<E>(r) + i, extent.stream);
  };
  for_each_vector<V, E, wide>(extent, k, body);
}

// The two sums of a block, sum u and sum u*v. Moments: u = v = x - shift (shift is passed as the mean). Backward: u = g,
// v = x - mean.
template <class V>
struct Pair {
  V u, v;
};

template <class E, bool plain>
struct MomentTerms {
  using Element = E;
  Extent extent;
  Runs xs;
  template <class V>
  [[gnu::always_inline]] Pair<V> at(int64_t r, int64_t i, const Held<V, E>& k) const {
    const V d = extent.if_valid<plain>(r, i, load<V>(xs.row<E>(r) + i) - k.mean);
    return {d, d};
  }
  [[gnu::always_inline]] void fetch(int64_t ahead, int64_t r, int64_t i) const { fetch_beyond(ahead, xs.row<E>(r) + i); }
};

template <Gate gate, class E, bool plain>
struct GradientTerms {
  using Element = E;
  Extent extent;
  Runs dys, xs, saveds, kept;  // kept: where g is put, if anywhere
  template <class V>
  [[gnu::always_inline]] Pair<V> at(int64_t r, int64_t i, const Held<V, E>& k) const {
    const E* x = xs.row<E>(r) + i;
    const V passed = gated<V, gate>(dys.row<E>(r) + i, x, gate == Gate::output ? saveds.row<E>(r) + i : nullptr, k);
    const V g = extent.if_valid<plain>(r, i, passed);
    if (!plain && kept.data != nullptr) put(g, kept.row<E>(r) + i, extent.stream);
    return {g, extent.if_valid<plain>(r, i, load<V>(x) - k.mean)};
  }
  [[gnu::always_inline]] void fetch(int64_t ahead, int64_t r, int64_t i) const {
    fetch_beyond(ahead, xs.row<E>(r) + i, dys.row<E>(r) + i);
    if constexpr (gate == Gate::output) fetch_beyond(ahead, saveds.row<E>(r) + i);
  }
};

// Narrow: four accumulators of each sum hide the latency of the adder (4 cycles, 2 ports). Those in float take a few terms each
// before they are emptied into double, so that their rounding stays below that of the terms.
template <class V, class Terms>
[[gnu::noinline]] void narrow_sums(Terms terms, const Coefficients& k, double* u_sum, double* uv_sum) {
  const Extent extent = terms.extent;
  constexpr int64_t count = Parts<V>::count;
  constexpr int few = sizeof(lane_t<V>) == sizeof(float) ? 8 : 1 << 30;
  using E = typename Terms::Element;
  const auto held = hold<V, E, false>(k, 0);
  const auto held_tail = hold<lane_t<V>, E, false>(k, 0);
  Doubles u_all = {}, uv_all = {};
  V u[4] = {}, uv[4] = {};
  double u_tail = 0, uv_tail = 0;
  int terms_held = 0;
  const auto empty = [&]() __attribute__((always_inline)) {
    u_all += folded((u[0] + u[1]) + (u[2] + u[3]));
    uv_all += folded((uv[0] + uv[1]) + (uv[2] + uv[3]));
    for (int a = 0; a < 4; ++a) u[a] = uv[a] = V{};
    terms_held = 0;
  };
  const auto add = [&](int a, const Pair<V>& pair) __attribute__((always_inline)) {
    u[a] += pair.u;
    uv[a] += pair.u * pair.v;
  };
  for (int64_t r = 0; r < extent.rows; ++r) {
    const int64_t ahead = r + 1 < extent.rows ? extent.ahead : 0;
    int64_t i = 0;
    for (; i + 4 * count <= extent.width; i += 4 * count) {
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        terms.fetch(ahead, r, i + a * count);
        add(a, terms.at(r, i + a * count, held));
      }
      if (++terms_held >= few) empty();
    }
#pragma GCC unroll 3
    for (int a = 0; a < 3; ++a) {
      if (i + count > extent.width) break;
      add(a, terms.at(r, i, held));
      i += count;
    }
    if (i < extent.width && extent.width >= count) {
      const auto pair = terms.at(r, extent.width - count, held);
      add(3, {last_lanes(pair.u, extent.width - i), pair.v});
      i = extent.width;
    }
    for (; i < extent.width; ++i) {
      const auto pair = terms.at(r, i, held_tail);
      u_tail += pair.u;
      uv_tail += double(pair.u) * pair.v;
    }
    if (++terms_held >= few) empty();
  }
  empty();
  *u_sum += total(u_all) + u_tail;
  *uv_sum += total(uv_all) + uv_tail;
}

constexpr int64_t summed_together = 16;  // rows
constexpr int64_t fetched_rows = 24;     // how many rows ahead: beyond those that are summed together

template <int count>
using Count = std::integral_constant<int, count>;

// Wide: some vectors of channels stay in registers over some rows, so that the sums are not read and written for every row.
template <class V, class Terms>
[[gnu::noinline]] void wide_sums(Terms terms, const Coefficients& k, double* u_sum, double* uv_sum) {
  using E = typename Terms::Element;
  const Extent extent = terms.extent;
  constexpr int64_t count = Parts<V>::count;
  const auto columns = [&]<class U, int many>(U, Count<many>, int64_t first, int64_t i) __attribute__((always_inline)) {
    constexpr int64_t step = Parts<U>::count;
    const int64_t last = first + summed_together < extent.rows ? first + summed_together : extent.rows;
    Held<U, E> held[many];
    U u[many] = {}, uv[many] = {};
    for (int a = 0; a < many; ++a) held[a] = hold<U, E, true>(k, i + a * step);
    for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 8
      for (int a = 0; a < many; ++a) {
        if constexpr (step > 1) terms.fetch(extent.ahead, r, i + a * step);
        const auto pair = terms.at(r, i + a * step, held[a]);
        u[a] += pair.u;
        uv[a] += pair.u * pair.v;
      }
    }
    for (int a = 0; a < many; ++a) {
      accumulate(u[a], u_sum + i + a * step);
      accumulate(uv[a], uv_sum + i + a * step);
    }
  };
  int64_t done = 0;
  if constexpr (std::is_same_v<V, Singles> && !is_half<E>) {  // eight cache lines in a row are a pattern that processors see
    constexpr int strip = 8;
    if (extent.apart)
      for (; done + strip * count <= extent.width; done += strip * count)
        for (int64_t first = 0; first < extent.rows; first += summed_together) columns(V{}, Count<strip>{}, first, done);
  }
  constexpr int many = side_by_side<V, E>;
  for (int64_t first = 0; first < extent.rows; first += summed_together) {
    int64_t i = done;
    for (; i + many * count <= extent.width; i += many * count) columns(V{}, Count<many>{}, first, i);
    for (; i + count <= extent.width; i += count) columns(V{}, Count<1>{}, first, i);
    for (; i < extent.width; ++i) columns(lane_t<V>{}, Count<1>{}, first, i);
  }
}

}  // namespace
