// Activations: one struct each, its value and its derivative as functions of z; `curves` is the table that names them by code.
//
// The loops over these functions are vectorised by the compiler, so the float32 versions are polynomials without branches, and
// each is inlined by order (left to itself GCC stops inlining in so large a file, and the loop runs 30 times slower):
// exp is within 1 unit in the last place (ulp) of its result, expm1, tanh and sigmoid within 2, the normal distribution's tail
// within 4 down to z = -5. Double calls the C library, one value at a time. The derivatives use only |z| in the exponential, so
// that nothing overflows and nothing near 1 is subtracted from 1.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace {

// exp(x) = (1 + tail) * low * high, low and high powers of two whose product may lie outside float's range.
struct Exponential {
  float tail, low, high;
};

// x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds n to an integer and leaves it in the low bits. ln 2 is split in two
// so that n ln 2 is exact. exp(r) - 1 = r + r^2 q(r), q of degree 4 by a weighted minimax fit, error 3e-9.
[[gnu::always_inline]] inline Exponential exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 0.0013950538f;
  q = q * r + 0.008368918f;
  q = q * r + 0.041666206f;
  q = q * r + 0.16666518f;
  q = q * r + 0.5f;
  const int32_t whole = int32_t(std::bit_cast<uint32_t>(shifted) - 0x4b400000u);
  const int32_t half = whole >> 1;
  return {r + r * r * q, std::bit_cast<float>(uint32_t(half + 127) << 23),
          std::bit_cast<float>(uint32_t(whole - half + 127) << 23)};
}

[[gnu::always_inline]] inline float exp_of(float x) {
  const Exponential e = exponential(x);
  return (e.tail * e.low + e.low) * e.high;
}
[[gnu::always_inline]] inline double exp_of(double x) { return std::exp(x); }

[[gnu::always_inline]] inline float expm1_of(float x) {
  const Exponential e = exponential(x);
  const float power = e.low * e.high;
  return e.tail * power + (power - 1.0f);
}
[[gnu::always_inline]] inline double expm1_of(double x) { return std::expm1(x); }

// The upper tail of the normal distribution, P(Z > size) for size >= 0: exp(-size^2/2) * t * q(t), t = 1 / (1 + 0.35 size).
// One formula over the whole half line, q of degree 10 by a minimax fit, relative error 1.3e-8.
[[gnu::always_inline]] inline float normal_tail(float size, float density) {
  const float t = 1.0f / (1.0f + 0.35f * size);
  float q = 0.019379022f;
  q = q * t + -0.108779326f;
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

template <class S>
[[gnu::always_inline]] inline S size_of(S z) {
  return z < 0 ? -z : z;
}

// sigmoid(|z|) and sigmoid(-|z|), each to full relative precision.
template <class S>
struct Gates {
  S large, small;
};
template <class S>
[[gnu::always_inline]] inline Gates<S> gates(S z) {
  const S e = exp_of(-size_of(z));
  const S large = S(1) / (S(1) + e);
  return {large, e * large};
}
template <class S>
[[gnu::always_inline]] inline S sigmoid(S z) {
  const Gates<S> s = gates(z);
  return z < 0 ? s.small : s.large;
}

struct Identity {
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return z; }
  template <class S> [[gnu::always_inline]] static S slope(S, S) { return 1; }
};

struct Relu {
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return z <= 0 ? S(0) : z; }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) { return z <= 0 ? S(0) : S(1); }
};

struct LeakyRelu {
  template <class S> [[gnu::always_inline]] static S value(S z, S parameter) { return z > 0 ? z : z * parameter; }
  template <class S> [[gnu::always_inline]] static S slope(S z, S parameter) { return z > 0 ? S(1) : parameter; }
};

struct Silu {
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return z / (S(1) + exp_of(-z)); }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    const Gates<S> s = gates(z);
    const S up = z < 0 ? s.small : s.large;
    const S down = z < 0 ? s.large : s.small;
    return up * (S(1) + z * down);
  }
};

struct Gelu {
  template <class S> [[gnu::always_inline]] static S below(S z) {  // P(Z < z)
    const S size = size_of(z);
    const S tail = normal_tail(size, exp_of(S(-0.5) * size * size));
    return z < 0 ? tail : S(1) - tail;
  }
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return z * below(z); }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    return below(z) + z * S(0.39894228040143267794) * exp_of(S(-0.5) * z * z);
  }
};

struct Elu {
  template <class S> [[gnu::always_inline]] static S value(S z, S parameter) {
    const S low = parameter * expm1_of(z > 0 ? S(0) : z);
    return z > 0 ? z : low;
  }
  template <class S> [[gnu::always_inline]] static S slope(S z, S parameter) {
    const S low = parameter * exp_of(z > 0 ? S(0) : z);
    return z <= 0 ? low : S(1);  // NaN lets the gradient pass, as in torch
  }
};

struct HardSwish {
  template <class S> [[gnu::always_inline]] static S value(S z, S) {
    const S up = z + S(3) < 0 ? S(0) : z + S(3);
    return z * (up > 6 ? S(6) : up) / S(6);
  }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    const S middle = z < 3 ? z / S(3) + S(0.5) : S(1);
    return z <= -3 ? S(0) : middle;
  }
};

struct Sigmoid {
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return sigmoid(z); }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    const Gates<S> s = gates(z);
    return s.large * s.small;
  }
};

struct Tanh {
  [[gnu::always_inline]] static float value(float z, float) {
    float size = size_of(z);
    size = size > 10.0f ? 10.0f : size;
    const float grown = expm1_of(2.0f * size);
    return std::copysign(grown / (grown + 2.0f), z);
  }
  [[gnu::always_inline]] static double value(double z, double) { return std::tanh(z); }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    const Gates<S> s = gates(S(2) * z);
    return S(4) * s.large * s.small;
  }
};

// 0.5 z (1 + tanh(u)) = z sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3). Beyond 20 the slope is 0 or 1; the clamp keeps
// z^2 from overflowing.
struct GeluTanh {
  template <class S> [[gnu::always_inline]] static S doubled(S z) {
    return S(1.59576912160573071176) * (z + S(0.044715) * z * z * z);
  }
  template <class S> [[gnu::always_inline]] static S value(S z, S) { return z * sigmoid(doubled(z)); }
  template <class S> [[gnu::always_inline]] static S slope(S z, S) {
    z = z > 20 ? S(20) : z;
    z = z < -20 ? S(-20) : z;
    const Gates<S> s = gates(doubled(z));
    const S up = z < 0 ? s.small : s.large;
    return up + z * s.large * s.small * S(1.59576912160573071176) * (S(1) + S(3 * 0.044715) * z * z);
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

// Calls run(first, last) for runs of a vector loop, and fetches in between.
template <class S, class Run>
[[gnu::always_inline]] inline void with_next(int64_t count, Next next, const Run& run) {
  constexpr int64_t some = 64;
  int64_t i = 0;
  for (; i + some <= count; i += some) {
    next.fetch(i * int64_t(sizeof(S)), (i + some) * int64_t(sizeof(S)));
    run(i, i + some);
  }
  if (i < count) run(i, count);
}

template <class A, class S>
void value_run(S* z, int64_t count, S parameter, Next next) {
  with_next<S>(count, next, [=](int64_t i, int64_t last) __attribute__((always_inline)) {
    for (; i < last; ++i) z[i] = A::value(z[i], parameter);
  });
}

template <class A, class S>
void slope_run(const S* z, const S* __restrict dy, S* __restrict g, int64_t count, S parameter, Next next) {
  with_next<S>(count, next, [=](int64_t i, int64_t last) __attribute__((always_inline)) {
    for (; i < last; ++i) g[i] = dy[i] * A::slope(z[i], parameter);
  });
}

template <class S, class... A>
struct Table {
  static constexpr Curve<S> rows[] = {{value_run<A, S>, slope_run<A, S>}...};
};

// In the order of evenorm.activations.TABLE.
template <class S>
[[gnu::always_inline]] inline const Curve<S>& curve(int code) {
  return Table<S, Identity, Relu, LeakyRelu, Silu, Gelu, Elu, HardSwish, Sigmoid, Tanh, GeluTanh>::rows[code];
}

constexpr int identity_code = 0, relu_code = 1, leaky_relu_code = 2;

}  // namespace
