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

template <class S>
struct Runs {
  S* data = nullptr;
  int64_t stride = 0;
  S* row(int64_t r) const { return data + r * stride; }
};

struct Extent {
  int64_t rows, width;
};

enum class Gate { none, input, output };  // the ReLU's gate: none, the sign of z rebuilt from x, the sign of the saved y

template <class V>
inline V positive_part(V z) {
  return z <= V{} ? V{} : z;  // NaN stays NaN
}

template <class V, bool wide, Gate gate, class S>
inline V gated(const S* dy, const S* x, const S* saved, const Coefficients& k, int64_t i) {
  const V g = load<V>(dy + i);
  if constexpr (gate == Gate::none) {
    return g;
  } else if constexpr (gate == Gate::output) {
    const V y = load<V>(saved + i);
    return y <= V{} ? V{} : g;
  } else {
    const V centred = load<V>(x + i) - coefficient<V, wide>(k.mean, i);
    const V z = centred * coefficient<V, wide>(k.scale, i) + coefficient<V, wide>(k.bias, i);
    return z <= V{} ? V{} : g;
  }
}

template <bool wide, bool residual, bool relu, class S>
void normalize_block(Extent extent, Runs<const S> xs, Runs<const S> residuals, Runs<S> ys, Coefficients k) {
  for (int64_t r = 0; r < extent.rows; ++r) {
    const S* x = xs.row(r);
    const S* add = residual ? residuals.row(r) : nullptr;
    S* y = ys.row(r);
    const auto step = [&]<class V>(V, int64_t i) {
      const V centred = load<V>(x + i) - coefficient<V, wide>(k.mean, i);
      V z = centred * coefficient<V, wide>(k.scale, i) + coefficient<V, wide>(k.bias, i);
      if constexpr (residual) z += load<V>(add + i);
      store(relu ? positive_part(z) : z, y + i);
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= extent.width; i += 2 * lanes) {
      step(Doubles{}, i);
      step(Doubles{}, i + lanes);
    }
    for (; i + lanes <= extent.width; i += lanes) step(Doubles{}, i);
    for (; i < extent.width; ++i) step(double{}, i);
  }
}

template <bool wide, Gate gate, bool centred, bool residual, class S>
void gradient_block(Extent extent, Runs<const S> dys, Runs<const S> xs, Runs<const S> saveds, Runs<S> dxs,
                    Runs<S> dresiduals, Coefficients k) {
  for (int64_t r = 0; r < extent.rows; ++r) {
    const S* dy = dys.row(r);
    const S* x = xs.row(r);
    const S* saved = gate == Gate::output ? saveds.row(r) : nullptr;
    S* dx = dxs.row(r);
    S* dresidual = residual ? dresiduals.row(r) : nullptr;
    const auto step = [&]<class V>(V, int64_t i) {
      const V g = gated<V, wide, gate>(dy, x, saved, k, i);
      if constexpr (residual) store(g, dresidual + i);
      V inner = g;
      if constexpr (centred) {
        const V from_mean = load<V>(x + i) - coefficient<V, wide>(k.mean, i);
        inner = g - coefficient<V, wide>(k.offset, i) - coefficient<V, wide>(k.slope, i) * from_mean;
      }
      store(coefficient<V, wide>(k.scale, i) * inner, dx + i);
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= extent.width; i += 2 * lanes) {
      step(Doubles{}, i);
      step(Doubles{}, i + lanes);
    }
    for (; i + lanes <= extent.width; i += lanes) step(Doubles{}, i);
    for (; i < extent.width; ++i) step(double{}, i);
  }
}

// The two sums of a block, sum u and sum u*v. Moments: u = v = x - shift (shift is passed as the mean). Backward: u = g,
// v = x - mean.
template <class V>
struct Pair {
  V u, v;
};

template <bool wide, class S>
struct MomentTerms {
  Runs<const S> xs;
  Coefficients k;
  template <class V>
  Pair<V> at(V, int64_t r, int64_t i) const {
    const V d = load<V>(xs.row(r) + i) - coefficient<V, wide>(k.mean, i);
    return {d, d};
  }
};

template <bool wide, Gate gate, class S>
struct GradientTerms {
  Runs<const S> dys, xs, saveds;
  Coefficients k;
  template <class V>
  Pair<V> at(V, int64_t r, int64_t i) const {
    const S* x = xs.row(r);
    const V g = gated<V, wide, gate>(dys.row(r), x, gate == Gate::output ? saveds.row(r) : nullptr, k, i);
    return {g, load<V>(x + i) - coefficient<V, wide>(k.mean, i)};
  }
};

// Narrow: four accumulators of each sum hide the latency of the adder (4 cycles, 2 ports).
template <class Terms>
void narrow_sums(Extent extent, const Terms& terms, double* u_sum, double* uv_sum) {
  Doubles u[4] = {}, uv[4] = {};
  double u_tail = 0, uv_tail = 0;
  for (int64_t r = 0; r < extent.rows; ++r) {
    int64_t i = 0;
    for (; i + 4 * lanes <= extent.width; i += 4 * lanes) {
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        const auto pair = terms.at(Doubles{}, r, i + a * lanes);
        u[a] += pair.u;
        uv[a] += pair.u * pair.v;
      }
    }
    for (; i + lanes <= extent.width; i += lanes) {
      const auto pair = terms.at(Doubles{}, r, i);
      u[0] += pair.u;
      uv[0] += pair.u * pair.v;
    }
    for (; i < extent.width; ++i) {
      const auto pair = terms.at(double{}, r, i);
      u_tail += pair.u;
      uv_tail += pair.u * pair.v;
    }
  }
  *u_sum += total((u[0] + u[1]) + (u[2] + u[3])) + u_tail;
  *uv_sum += total((uv[0] + uv[1]) + (uv[2] + uv[3])) + uv_tail;
}

// Wide: a vector of channels stays in registers over some rows, so that the sums are not read and written for every row.
template <class Terms>
void wide_sums(Extent extent, const Terms& terms, double* u_sum, double* uv_sum) {
  constexpr int64_t rows_held = 8;
  for (int64_t first = 0; first < extent.rows; first += rows_held) {
    const int64_t last = first + rows_held < extent.rows ? first + rows_held : extent.rows;
    const auto column = [&]<class V>(V, int64_t i) {
      V u = load<V>(u_sum + i), uv = load<V>(uv_sum + i);
      for (int64_t r = first; r < last; ++r) {
        const auto pair = terms.at(V{}, r, i);
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
inline void pair_sums(Extent extent, const Terms& terms, double* u_sum, double* uv_sum) {
  if constexpr (wide) {
    wide_sums(extent, terms, u_sum, uv_sum);
  } else {
    narrow_sums(extent, terms, u_sum, uv_sum);
  }
}

}  // namespace
