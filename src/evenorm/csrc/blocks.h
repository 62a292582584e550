// The arithmetic of batch norm over one block: `rows` runs of `width` elements, `stride` elements apart.
//
// `wide` says where the coefficients come from: one for the whole block (planes: a run belongs to one channel), or one for each
// element of a run (rows: a run is a row of channels). There is no other difference between the layouts.
//
//   z = (x - mean) * scale + bias + residual                       scale = weight / sqrt(var + eps)
//   dx = scale * (g - offset - slope * (x - mean))                 slope = (sum of g * xhat) / count / sqrt(var + eps)
//
// x is centred before it is scaled: x - mean is exact to the last bit of x when the offset is large, x * scale is not.
#pragma once

#include "numbers.h"

namespace {

struct Coefficients {
  const double* mean;
  const double* scale;
  const double* bias;
  const double* offset;
  const double* slope;
};

// The coefficients of the elements from i on, in registers.
template <class V>
struct Held {
  V mean, scale, bias, offset, slope;
};

template <class V, bool wide>
[[gnu::always_inline]] inline V held_value(const double* values, int64_t i) {
  if constexpr (wide) {
    return load<V>(values + i);
  } else {
    return splat<V>(*values);
  }
}

template <class V, bool wide>
[[gnu::always_inline]] inline Held<V> hold(const Coefficients& k, int64_t i) {
  return {held_value<V, wide>(k.mean, i), held_value<V, wide>(k.scale, i), held_value<V, wide>(k.bias, i),
          held_value<V, wide>(k.offset, i), held_value<V, wide>(k.slope, i)};
}

template <class V>
[[gnu::always_inline]] inline Held<V> first_lane(const Held<Doubles>& all) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return {all.mean[0], all.scale[0], all.bias[0], all.offset[0], all.slope[0]};
  } else {
    return all;
  }
}

template <class S>
struct Runs {
  S* data = nullptr;
  int64_t stride = 0;
  S* row(int64_t r) const { return data + r * stride; }
};

struct Extent {
  int64_t rows, width;
  int64_t ahead = 0;  // where, from each run, the run lies that comes next in memory but not in time; 0: nothing to fetch
};

// Short runs far apart are over before the processor sees a pattern to fetch ahead by.
template <class S>
[[gnu::always_inline]] inline void fetch_ahead(const S* run, const Extent& extent) {
  if (extent.ahead == 0) return;
  const char* from = reinterpret_cast<const char*>(run + extent.ahead);
  for (int64_t at = 0; at < extent.width * int64_t(sizeof(S)); at += 64) __builtin_prefetch(from + at);
}

// body(V, r, i, held) for each element of the block, V Doubles or, at the end of a run, double. Of wide blocks some rows are
// done together, so that a coefficient is loaded once for all of them; of narrow ones it stays in its register throughout.
// before(r) comes first in each narrow run.
template <bool wide, class Before, class Body>
[[gnu::always_inline]] inline void for_each_vector(Extent extent, const Coefficients& k, const Before& before,
                                                           const Body& body) {
  constexpr int64_t together = wide ? 4 : 1;
  const Held<Doubles> all = hold<Doubles, false>(k, 0);
  const auto some_rows = [&](int64_t first, auto rows) __attribute__((always_inline)) {
    if constexpr (!wide) before(first);
    const auto column = [&]<class V>(V, int64_t i) __attribute__((always_inline)) {
      Held<V> held;
      if constexpr (wide) {
        held = hold<V, true>(k, i);
      } else {
        held = first_lane<V>(all);
      }
      for (int64_t r = 0; r < rows(); ++r) body(V{}, first + r, i, held);
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= extent.width; i += 2 * lanes) {
      column(Doubles{}, i);
      column(Doubles{}, i + lanes);
    }
    for (; i + lanes <= extent.width; i += lanes) column(Doubles{}, i);
    if (i < extent.width && extent.width >= lanes) return column(Doubles{}, extent.width - lanes);  // some of it once more
    for (; i < extent.width; ++i) column(double{}, i);
  };
  int64_t r = 0;
  for (; r + together <= extent.rows; r += together) some_rows(r, [] { return together; });
  for (; r < extent.rows; ++r) some_rows(r, [] { return int64_t(1); });
}

enum class Gate { none, input, output };  // the ReLU's gate: none, the sign of z rebuilt from x, the sign of the saved y

template <class V>
[[gnu::always_inline]] inline V positive_part(V z) {
  return z <= V{} ? V{} : z;  // NaN stays NaN
}

template <class V, Gate gate, class S>
[[gnu::always_inline]] inline V gated(const S* dy, const S* x, const S* saved, const Held<V>& k) {
  const V g = load<V>(dy);
  if constexpr (gate == Gate::none) {
    return g;
  } else if constexpr (gate == Gate::output) {
    const V y = load<V>(saved);
    return y <= V{} ? V{} : g;
  } else {
    const V z = (load<V>(x) - k.mean) * k.scale + k.bias;
    return z <= V{} ? V{} : g;
  }
}

template <bool wide, bool residual, bool relu, class S>
void normalize_block(Extent extent, Runs<const S> xs, Runs<const S> residuals, Runs<S> ys, const Coefficients& k) {
  const auto fetch = [&](int64_t r) { fetch_ahead(ys.row(r), extent); };
  const auto body = [&]<class V>(V, int64_t r, int64_t i, const Held<V>& held) __attribute__((always_inline)) {
    V z = (load<V>(xs.row(r) + i) - held.mean) * held.scale + held.bias;
    if constexpr (residual) z += load<V>(residuals.row(r) + i);
    store(relu ? positive_part(z) : z, ys.row(r) + i);
  };
  for_each_vector<wide>(extent, k, fetch, body);
}

template <bool wide, Gate gate, bool centred, bool residual, class S>
void gradient_block(Extent extent, Runs<const S> dys, Runs<const S> xs, Runs<const S> saveds, Runs<S> dxs,
                    Runs<S> dresiduals, const Coefficients& k) {
  const auto fetch = [&](int64_t r) {
    fetch_ahead(dxs.row(r), extent);
    if constexpr (residual) fetch_ahead(dresiduals.row(r), extent);
  };
  const auto body = [&]<class V>(V, int64_t r, int64_t i, const Held<V>& held) __attribute__((always_inline)) {
    const S* x = xs.row(r) + i;
    const V g = gated<V, gate>(dys.row(r) + i, x, gate == Gate::output ? saveds.row(r) + i : nullptr, held);
    if constexpr (residual) store(g, dresiduals.row(r) + i);
    V inner = g;
    if constexpr (centred) inner = g - held.offset - held.slope * (load<V>(x) - held.mean);
    store(held.scale * inner, dxs.row(r) + i);
  };
  for_each_vector<wide>(extent, k, fetch, body);
}

// The two sums of a block, sum u and sum u*v. Moments: u = v = x - shift (shift is passed as the mean). Backward: u = g,
// v = x - mean.
template <class V>
struct Pair {
  V u, v;
};

template <class S>
struct MomentTerms {
  Runs<const S> xs;
  template <class V>
  [[gnu::always_inline]] Pair<V> at(int64_t r, int64_t i, const Held<V>& k) const {
    const V d = load<V>(xs.row(r) + i) - k.mean;
    return {d, d};
  }
  void fetch(int64_t r, const Extent& extent) const { fetch_ahead(xs.row(r), extent); }
};

template <Gate gate, class S>
struct GradientTerms {
  Runs<const S> dys, xs, saveds;
  template <class V>
  [[gnu::always_inline]] Pair<V> at(int64_t r, int64_t i, const Held<V>& k) const {
    const S* x = xs.row(r) + i;
    const V g = gated<V, gate>(dys.row(r) + i, x, gate == Gate::output ? saveds.row(r) + i : nullptr, k);
    return {g, load<V>(x) - k.mean};
  }
  void fetch(int64_t r, const Extent& extent) const {
    fetch_ahead(dys.row(r), extent);
    fetch_ahead(xs.row(r), extent);
    if constexpr (gate == Gate::output) fetch_ahead(saveds.row(r), extent);
  }
};

// Narrow: four accumulators of each sum hide the latency of the adder (4 cycles, 2 ports).
template <class Terms>
void narrow_sums(Extent extent, const Terms& terms, const Coefficients& k, double* u_sum, double* uv_sum) {
  const auto held = hold<Doubles, false>(k, 0);
  const auto held_tail = hold<double, false>(k, 0);
  Doubles u[4] = {}, uv[4] = {};
  double u_tail = 0, uv_tail = 0;
  for (int64_t r = 0; r < extent.rows; ++r) {
    terms.fetch(r, extent);
    int64_t i = 0;
    for (; i + 4 * lanes <= extent.width; i += 4 * lanes) {
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        const auto pair = terms.at(r, i + a * lanes, held);
        u[a] += pair.u;
        uv[a] += pair.u * pair.v;
      }
    }
    for (; i + lanes <= extent.width; i += lanes) {
      const auto pair = terms.at(r, i, held);
      u[0] += pair.u;
      uv[0] += pair.u * pair.v;
    }
    if (i < extent.width && extent.width >= lanes) {
      const auto pair = terms.at(r, extent.width - lanes, held);
      const Doubles fresh = last_lanes(pair.u, extent.width - i);
      u[1] += fresh;
      uv[1] += fresh * pair.v;
      continue;
    }
    for (; i < extent.width; ++i) {
      const auto pair = terms.at(r, i, held_tail);
      u_tail += pair.u;
      uv_tail += pair.u * pair.v;
    }
  }
  *u_sum += total((u[0] + u[1]) + (u[2] + u[3])) + u_tail;
  *uv_sum += total((uv[0] + uv[1]) + (uv[2] + uv[3])) + uv_tail;
}

// Wide: a vector of channels stays in registers over some rows, so that the sums are not read and written for every row.
template <class Terms>
void wide_sums(Extent extent, const Terms& terms, const Coefficients& k, double* u_sum, double* uv_sum) {
  constexpr int64_t rows_held = 4;
  for (int64_t first = 0; first < extent.rows; first += rows_held) {
    const int64_t last = first + rows_held < extent.rows ? first + rows_held : extent.rows;
    const auto column = [&]<class V>(V, int64_t i) {
      const Held<V> held = hold<V, true>(k, i);
      V u = load<V>(u_sum + i), uv = load<V>(uv_sum + i);
      for (int64_t r = first; r < last; ++r) {
        const auto pair = terms.at(r, i, held);
        u += pair.u;
        uv += pair.u * pair.v;
      }
      store(u, u_sum + i);
      store(uv, uv_sum + i);
    };
    int64_t i = 0;
    for (; i + lanes <= extent.width; i += lanes) column(Doubles{}, i);
    for (; i < extent.width; ++i) column(double{}, i);
  }
}

template <bool wide, class Terms>
inline void pair_sums(Extent extent, const Terms& terms, const Coefficients& k, double* u_sum, double* uv_sum) {
  if constexpr (wide) {
    wide_sums(extent, terms, k, u_sum, uv_sum);
  } else {
    narrow_sums(extent, terms, k, u_sum, uv_sum);
  }
}

}  // namespace
