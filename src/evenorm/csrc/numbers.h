// Number formats and vectors of the instruction set this file is compiled for.
//
// Arithmetic runs in double whatever the storage type: float32 is widened on load and rounded once on store. That costs two
// conversions a vector in loops that wait for memory, and buys: sums with no blocks to flush, squares of 1e30 that do not
// overflow, and outputs whose error is half a unit in the last place.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 8;
#elif defined(__AVX__)
constexpr int lanes = 4;
#else
constexpr int lanes = 2;
#endif

typedef double Doubles __attribute__((vector_size(lanes * 8)));
typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef int64_t Longs __attribute__((vector_size(lanes * 8)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline float widen(float value) { return value; }
[[gnu::always_inline]] inline double widen(double value) { return value; }
[[gnu::always_inline]] inline float widen(bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

// The exponent is moved by a product with 2^112, which is exact for subnormals too; inf and NaN get the top exponent back.
[[gnu::always_inline]] inline float widen(float16 value) {
  const uint32_t bits = value.bits;
  const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * std::bit_cast<float>(239u << 23);
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | ((bits & 0x8000u) << 16));
}

[[gnu::always_inline]] inline void narrow(float value, float* out) { *out = value; }
[[gnu::always_inline]] inline void narrow(double value, double* out) { *out = value; }

[[gnu::always_inline]] inline void narrow(float value, bfloat16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;  // quiet, and never rounded up into infinity
  out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Normal results: add half an ulp less one plus the odd bit, then drop 13 bits. Subnormal results: adding 0.5 aligns the binary
// point so that the float adder rounds to nearest even for us.
[[gnu::always_inline]] inline void narrow(float value, float16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  const uint32_t finite = size < (113u << 23) ? small : normal;
  const uint32_t overflowed = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = uint16_t((size >= 0x47800000u ? overflowed : finite) | sign);
}

#if defined(__AVX512F__)
// GCC 12 splits a 512 bit conversion into two halves and a shuffle where it is not told.
[[gnu::always_inline]] inline Doubles widened(Floats value) { return (Doubles)_mm512_cvtps_pd((__m256)value); }
[[gnu::always_inline]] inline Floats narrowed(Doubles value) { return (Floats)_mm512_cvtpd_ps((__m512d)value); }
#else
[[gnu::always_inline]] inline Doubles widened(Floats value) { return __builtin_convertvector(value, Doubles); }
[[gnu::always_inline]] inline Floats narrowed(Doubles value) { return __builtin_convertvector(value, Floats); }
#endif

// V is Doubles for the body of a loop and double for its tail: one formula serves both.
template <class V, class T>
[[gnu::always_inline]] inline V load(const T* from) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return double(*from);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    Doubles value;
    std::memcpy(&value, from, sizeof value);
    return value;
  } else {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return widened(value);
  }
}

template <class V, class T>
[[gnu::always_inline]] inline void store(V value, T* to) {
  if constexpr (sizeof(V) == sizeof(double)) {
    *to = T(value);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    std::memcpy(to, &value, sizeof value);
  } else {
    const Floats small = narrowed(value);
    std::memcpy(to, &small, sizeof small);
  }
}

template <class V>
[[gnu::always_inline]] inline V splat(double value) {
  return value - V{};  // minus zero, unlike plus, changes no value, so that compilers leave it out
}

// The last `count` lanes; 0 in the others.
[[gnu::always_inline]] inline Doubles last_lanes(Doubles value, int64_t count) {
  Longs lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  return lane < Longs{} + (lanes - count) ? Doubles{} : value;
}

[[gnu::always_inline]] inline double total(Doubles value) {
  double sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += value[lane];
  return sum;
}

template <class T, class S>
[[gnu::always_inline]] inline void widen_run(const T* from, S* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class S, class T>
[[gnu::always_inline]] inline void narrow_run(const S* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
}

#if defined(__F16C__)
[[gnu::always_inline]] inline void widen_run(const float16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

[[gnu::always_inline]] inline void narrow_run(const float* from, float16* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) narrow(from[i], to + i);
}
#endif

}  // namespace
