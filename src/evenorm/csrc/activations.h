// Activations: one struct each, its value and its derivative as functions of z; `curves` is the table that names them by code.
//
// S is a vector of floats, or one double. The float32 versions are polynomials without branches, and each is inlined by order (left
// to itself GCC stops inlining in so large a file, and the loop runs 30 times slower): exp is within 1 unit in the last place (ulp)
// of its result, expm1, tanh and sigmoid within 2, the normal distribution's tail within 4 down to z = -5. Double calls the C
// library, one value at a time. All use only |z| in the exponential, so that nothing overflows and nothing near 1 is subtracted
// from 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace {

// A number that is the same in all lanes.
template <class S>
[[gnu::always_inline]] inline S same(double value) {
  return splat<S>(lane_t<S>(value));
}

// NaN stays NaN.
[[gnu::always_inline]] inline Singles at_least(Singles value, float least) {
#if defined(__AVX512F__)
  return (Singles)_mm512_max_ps(_mm512_set1_ps(least), (__m512)value);
#else
  return value < least ? same<Singles>(least) : value;
#endif
}

[[gnu::always_inline]] inline Singles nearest_integer(Singles value) {
#if defined(__AVX512F__)
  return (Singles)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (value + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23, beside which a float has no fraction
#endif
}

// value * 2^exponent, an integer from -150 to 128: without the instruction the product of two powers, since one may lie outside
// float's range.
[[gnu::always_inline]] inline Singles scaled(Singles value, Singles exponent) {
#if defined(__AVX512F__)
  return (Singles)_mm512_scalef_ps((__m512)value, (__m512)exponent);
#else
  const Integers whole = __builtin_convertvector(exponent, Integers), half = whole >> 1;
  return value * (Singles)((half + 127) << 23) * (Singles)((whole - half + 127) << 23);
#endif
}

// exp(x) = (1 + tail) * 2^exponent
struct Exponential {
  Singles tail, exponent;
};

// For x <= 89. x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 is split in two so that n ln 2 is exact. exp(r) - 1 = r + r^2 q(r), q of
// degree 4 by a weighted minimax fit, error 3e-9.
[[gnu::always_inline]] inline Exponential exponential(Singles x) {
  x = at_least(x, -104.0f);
  const Singles n = nearest_integer(x * 1.44269504f);
  const Singles r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Singles q = r * 0.0013950538f + 0.008368918f;
  q = q * r + 0.041666206f;
  q = q * r + 0.16666518f;
  q = q * r + 0.5f;
  return {r + r * r * q, n};
}

[[gnu::always_inline]] inline Singles exp_of(Singles x) {
  const Exponential e = exponential(x);
  return scaled(e.tail + 1.0f, e.exponent);
}
[[gnu::always_inline]] inline double exp_of(double x) { return std::exp(x); }

[[gnu::always_inline]] inline Singles expm1_of(Singles x) {
  const Exponential e = exponential(x);
  const Singles power = scaled(same<Singles>(1), e.exponent);
  return e.tail * power + (power - 1.0f);
}
[[gnu::always_inline]] inline double expm1_of(double x) { return std::expm1(x); }

// The upper tail of the normal distribution, P(Z > size) for size >= 0: exp(-size^2/2) * t * q(t), t = 1 / (1 + 0.35 size).
// One formula over the whole half line, q of degree 10 by a minimax fit, relative error 1.3e-8.
[[gnu::always_inline]] inline Singles normal_tail(Singles size, Singles density) {
  const Singles t = 1.0f / (0.35f * size + 1.0f);
  Singles q = t * 0.019379022f + -0.108779326f;
  q = q * t + 0.2365714f;
  q = q * t + -0.22672698f;
  q = q * t + 0.07014861f;
  q = q * t + -0.028655758f;
  q = q * t + 0.048475575f;
  q = q * t + 0.087774456f;
  q = q * t + 0.122554f;
  q = q * t + 0.13962919f;
  q = q * t + 0.1396298f;
  return density * t * q;
}
[[gnu::always_inline]] inline double normal_tail(double size, double) { return 0.5 * std::erfc(size * 0.70710678118654752440); }

// sigmoid(|z|) and sigmoid(-|z|), each to full relative precision.
template <class S>
struct Gates {
  S large, small;
};
template <class S>
[[gnu::always_inline]] inline Gates<S> gates(S z) {
  const S e = exp_of(-size_of(z));
  const S large = lane_t<S>(1) / (e + lane_t<S>(1));
  return {large, e * large};
}
template <class S>
[[gnu::always_inline]] inline S sigmoid(S z) {
  const Gates<S> s = gates(z);
  return z < S{} ? s.small : s.large;
}

// P is the number that S is made of.
struct Identity {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) { return z; }
  template <class S, class P> [[gnu::always_inline]] static S slope(S, P) { return same<S>(1); }
};

struct Relu {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) { return z <= S{} ? S{} : z; }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) { return z <= S{} ? S{} : same<S>(1); }
};

struct LeakyRelu {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P parameter) { return z > S{} ? z : z * parameter; }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P parameter) {
    return z > S{} ? same<S>(1) : same<S>(parameter);
  }
};

struct Silu {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) {
    const S e = exp_of(-size_of(z));
    return (z < S{} ? z * e : z) / (e + P(1));
  }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    const Gates<S> s = gates(z);
    const S up = z < S{} ? s.small : s.large;
    return up + z * (s.small * s.large);
  }
};

struct Gelu {
  template <class S> [[gnu::always_inline]] static S below(S z, S density) {  // P(Z < z)
    const S tail = normal_tail(size_of(z), density);
    return z < S{} ? tail : lane_t<S>(1) - tail;
  }
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) { return z * below(z, exp_of(z * z * P(-0.5))); }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    const S density = exp_of(z * z * P(-0.5));
    return below(z, density) + z * P(0.39894228040143267794) * density;
  }
};

struct Elu {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P parameter) {
    const S low = parameter * expm1_of(z > S{} ? S{} : z);
    return z > S{} ? z : low;
  }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P parameter) {
    const S low = parameter * exp_of(z > S{} ? S{} : z);
    return z <= S{} ? low : same<S>(1);  // NaN lets the gradient pass, as in torch
  }
};

struct HardSwish {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) {
    const S up = z + P(3) < S{} ? S{} : z + P(3);
    return z * (up > P(6) ? same<S>(6) : up) / P(6);
  }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    const S middle = z < P(3) ? z / P(3) + P(0.5) : same<S>(1);
    return z <= P(-3) ? S{} : middle;
  }
};

struct Sigmoid {
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) { return sigmoid(z); }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    const Gates<S> s = gates(z);
    return s.large * s.small;
  }
};

struct Tanh {
  [[gnu::always_inline]] static Singles value(Singles z, float) {
    Singles size = size_of(z);
    size = size > 10.0f ? same<Singles>(10) : size;
    const Singles grown = expm1_of(2.0f * size);
    return (Singles)((Integers)(grown / (grown + 2.0f)) | ((Integers)z & int32_t(0x80000000)));
  }
  [[gnu::always_inline]] static double value(double z, double) { return std::tanh(z); }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    const Gates<S> s = gates(z * P(2));
    return P(4) * s.large * s.small;
  }
};

// 0.5 z (1 + tanh(u)) = z sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3). Beyond 20 the slope is 0 or 1; the clamp keeps
// z^2 from overflowing.
struct GeluTanh {
  template <class S> [[gnu::always_inline]] static S doubled(S z) {
    using P = lane_t<S>;
    return P(1.59576912160573071176) * (z + P(0.044715) * z * z * z);
  }
  template <class S, class P> [[gnu::always_inline]] static S value(S z, P) { return z * sigmoid(doubled(z)); }
  template <class S, class P> [[gnu::always_inline]] static S slope(S z, P) {
    z = z > P(20) ? same<S>(20) : z;
    z = z < P(-20) ? same<S>(-20) : z;
    const Gates<S> s = gates(doubled(z));
    const S up = z < S{} ? s.small : s.large;
    return up + z * s.large * s.small * P(1.59576912160573071176) * (P(3 * 0.044715) * z * z + P(1));
  }
};

// What will be read next, to be fetched meanwhile: loops with so much to compute reach too few loads ahead for memory.
struct Next {
  const char *first = nullptr, *second = nullptr;

  [[gnu::always_inline]] void fetch(int64_t from, int64_t to) const {
    for (; from < to; from += 64) {
      if (first != nullptr) __builtin_prefetch(first + from, 0, 2);
      if (second != nullptr) __builtin_prefetch(second + from, 0, 2);
    }
  }
};

template <class S>
struct Curve {
  void (*value)(S* z, int64_t count, S parameter, Next next);                           // in place
  void (*slope)(const S* z, const S* dy, S* g, int64_t count, S parameter, Next next);  // g = dy times the slope
};

// to = f(from...) for runs of numbers, in vectors where they are float, with fetches in between.
template <class S, class F, class... From>
[[gnu::always_inline]] inline void map_run(int64_t count, Next next, const F& f, S* to, const From*... from) {
  using V = std::conditional_t<sizeof(S) == sizeof(float), Singles, S>;
  constexpr int64_t some = 64, lanes = Parts<V>::count;
  int64_t i = 0;
  for (; i + some <= count; i += some) {
    next.fetch(i * int64_t(sizeof(S)), (i + some) * int64_t(sizeof(S)));
    for (int64_t k = i; k < i + some; k += lanes) store(f(load<V>(from + k)...), to + k);
  }
  for (; i + lanes <= count; i += lanes) store(f(load<V>(from + i)...), to + i);
  if (i < count) store_first(f(load_first<V>(from + i, count - i)...), to + i, count - i);
}

template <class A, class S>
void value_run(S* z, int64_t count, S parameter, Next next) {
  map_run(count, next, [=](auto value) __attribute__((always_inline)) { return A::value(value, parameter); }, z, z);
}

template <class A, class S>
void slope_run(const S* z, const S* dy, S* g, int64_t count, S parameter, Next next) {
  map_run(count, next, [=](auto value, auto passed) __attribute__((always_inline)) { return passed * A::slope(value, parameter); }, g, z, dy);
}

template <class S, class... A>
struct Table {
  static_assert(sizeof...(A) == evenorm::activation_count);
  static constexpr Curve<S> rows[] = {{value_run<A, S>, slope_run<A, S>}...};
};

// In the order of evenorm.activations.TABLE.
template <class S>
[[gnu::always_inline]] inline const Curve<S>& curve(int code) {
  return Table<S, Identity, Relu, LeakyRelu, Silu, Gelu, Elu, HardSwish, Sigmoid, Tanh, GeluTanh>::rows[code];
}

constexpr int identity_code = 0, relu_code = 1, leaky_relu_code = 2;

}  // namespace
