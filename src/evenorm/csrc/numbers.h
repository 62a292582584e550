// Number formats and vectors of the instruction set this file is compiled for.
//
// A loop runs in one of two vectors of a whole register: Singles for tensors of float32 and the half precisions whose channels are
// well scaled, Doubles for float64 and for all others. Half precision becomes float32 on load and is rounded on store.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "engine.h"

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

// Whether a product and a sum are one rounding.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool fuses = true;
#else
constexpr bool fuses = false;
#endif

typedef double Doubles __attribute__((vector_size(lanes * 8)));
typedef float Singles __attribute__((vector_size(lanes * 8)));
typedef float Floats __attribute__((vector_size(lanes * 4)));  // as many as Doubles
typedef int64_t Longs __attribute__((vector_size(lanes * 8)));
typedef int32_t Integers __attribute__((vector_size(lanes * 8)));
typedef uint32_t Words __attribute__((vector_size(lanes * 8)));
typedef uint16_t Shorts __attribute__((vector_size(lanes * 4)));  // as many as Singles
typedef uint8_t Bytes __attribute__((vector_size(lanes * 2)));    // as many as Singles
typedef uint8_t FewBytes __attribute__((vector_size(lanes)));     // as many as Doubles

// What a vector is made of. The end of a loop is computed on one number at a time, by the same formula.
template <class V>
struct Parts {
  using Lane = V;
  static constexpr int count = 1;
};
template <>
struct Parts<Doubles> {
  using Lane = double;
  using Lanes = Longs;
  using Marks = FewBytes;
  static constexpr int count = lanes;
};
template <>
struct Parts<Floats> {
  using Lane = float;
  static constexpr int count = lanes;
};
template <>
struct Parts<Singles> {
  using Lane = float;
  using Lanes = Integers;
  using Marks = Bytes;
  static constexpr int count = 2 * lanes;
};
template <class V>
using lane_t = typename Parts<V>::Lane;

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

[[gnu::always_inline]] inline Singles load_half(const bfloat16* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
  return (Singles)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
  return (Singles)(__builtin_convertvector(bits, Words) << 16);
#endif
}

[[gnu::always_inline]] inline void store_half(Singles value, bfloat16* to) {
#if defined(__AVX512DQ__)
  // The processor's own rounding is the one below, but that it makes 0 of subnormals.
  if (evenorm::rounds_to_bfloat16) [[likely]] {
    constexpr int subnormal = 0x20;
    if (_mm512_fpclass_ps_mask((__m512)value, subnormal) == 0) [[likely]] {
      __m256i rounded;
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(value));
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    }
  }
#endif
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words words = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
#if defined(__AVX512F__)
  const Shorts narrow = (Shorts)_mm512_cvtepi32_epi16((__m512i)words);
#else
  const Shorts narrow = __builtin_convertvector(words, Shorts);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

#if defined(__AVX512F__)
[[gnu::always_inline]] inline Singles load_half(const float16* from) {
  return (Singles)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
[[gnu::always_inline]] inline void store_half(Singles value, float16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
[[gnu::always_inline]] inline Singles load_half(const float16* from) {
  return (Singles)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
[[gnu::always_inline]] inline void store_half(Singles value, float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
[[gnu::always_inline]] inline Singles load_half(const float16* from) {
  Singles value;
  for (int i = 0; i < 2 * lanes; ++i) value[i] = widen(from[i]);
  return value;
}
[[gnu::always_inline]] inline void store_half(Singles value, float16* to) {
  for (int i = 0; i < 2 * lanes; ++i) narrow(float(value[i]), to + i);
}
#endif

template <class V, class T>
[[gnu::always_inline]] inline V load(const T* from) {
  if constexpr (Parts<V>::count == 1) {
    return V(widen(*from));
  } else if constexpr (sizeof(T) == 2) {
    return load_half(from);
  } else if constexpr (sizeof(T) < sizeof(lane_t<V>)) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return widened(value);
  } else {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
}

template <class V, class T>
[[gnu::always_inline]] inline void store(V value, T* to) {
  if constexpr (sizeof(T) == 2 && Parts<V>::count > 1) {
    store_half(value, to);
  } else if constexpr (sizeof(T) == 2) {
    narrow(float(value), to);
  } else if constexpr (Parts<V>::count == 1) {
    *to = T(value);
  } else if constexpr (sizeof(T) < sizeof(lane_t<V>)) {
    const Floats small = narrowed(value);
    std::memcpy(to, &small, sizeof small);
  } else {
    std::memcpy(to, &value, sizeof value);
  }
}

// The first `count` lanes, less than all; 0 in the others.
template <class V>
[[gnu::always_inline]] inline V load_first(const lane_t<V>* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Singles>) return (V)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#endif
  lane_t<V> all[Parts<V>::count] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = from[i];
  return load<V>(all);
}
template <class V>
[[gnu::always_inline]] inline void store_first(V value, lane_t<V>* to, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Singles>) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
#endif
  lane_t<V> all[Parts<V>::count];
  store(value, all);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// Past the caches, from registers to memory, since writing a line of a cache reads it first; `to` is aligned to what is written.
#if defined(__AVX512F__)
constexpr bool streams = true;
template <class V, class T>
[[gnu::always_inline]] inline void stream_out(V value, T* to) {
  if constexpr (sizeof(T) == sizeof(lane_t<V>)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
  } else {
    __m256i small;
    store(value, reinterpret_cast<T*>(&small));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), small);
  }
}
inline void finish_streams() { _mm_sfence(); }
#else
constexpr bool streams = false;
inline void finish_streams() {}
#endif

template <class V, class T>
[[gnu::always_inline]] inline void put(V value, T* to, bool stream) {
#if defined(__AVX512F__)
  if constexpr (Parts<V>::count > 1)
    if (stream) return stream_out(value, to);
#endif
  (void)stream;
  store(value, to);
}

template <class V>
[[gnu::always_inline]] inline V splat(lane_t<V> value) {
  return value - V{};  // minus zero, unlike plus, changes no value, so that compilers leave it out
}

template <class S>
using vector_t = std::conditional_t<sizeof(S) == sizeof(double), Doubles, Singles>;

template <class S, class T>
[[gnu::always_inline]] inline void copy_out(const S* from, T* to, int64_t count, bool stream) {
  using V = vector_t<S>;
  int64_t i = 0;
  for (; i + Parts<V>::count <= count; i += Parts<V>::count) put(load<V>(from + i), to + i, stream);
  for (; i < count; ++i) narrow(from[i], to + i);
}

template <class V>
[[gnu::always_inline]] inline V size_of(V value) {
  if constexpr (std::is_same_v<V, Singles>) return (V)((Integers)value & 0x7fffffff);
  else if constexpr (std::is_same_v<V, Doubles>) return (V)((Longs)value & 0x7fffffffffffffff);
  else return value < 0 ? -value : value;
}

// Lanes in which something was the case at some time.
struct Flags {
  Integers lanes = {};
  bool single = false;
  [[gnu::always_inline]] void note(Integers where) { lanes |= where; }
  [[gnu::always_inline]] void note(bool there) { single |= there; }
  bool any() const {
    bool found = single;
    for (int i = 0; i < Parts<Singles>::count; ++i) found |= lanes[i] != 0;
    return found;
  }
};

// The last `count` lanes; 0 in the others.
template <class V>
[[gnu::always_inline]] inline V last_lanes(V value, int64_t count) {
  using Lanes = typename Parts<V>::Lanes;
  Lanes lane;
  for (int i = 0; i < Parts<V>::count; ++i) lane[i] = i;
  return lane < Lanes{} + (Parts<V>::count - int(count)) ? V{} : value;
}

// By selecting, not by branching: no processor foresees a mask.
template <class V>
[[gnu::always_inline]] inline V chosen(const uint8_t* marks, V where_set, V otherwise) {
  if constexpr (Parts<V>::count == 1) {
    return *marks ? where_set : otherwise;
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(lane_t<V>) == sizeof(float)) {
      const __m128i given = _mm_loadu_si128(reinterpret_cast<const __m128i*>(marks));
      return (V)_mm512_mask_blend_ps(_mm_test_epi8_mask(given, given), (__m512)otherwise, (__m512)where_set);
    } else {
      const __m128i given = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(marks));
      return (V)_mm512_mask_blend_pd(__mmask8(_mm_test_epi8_mask(given, given)), (__m512d)otherwise, (__m512d)where_set);
    }
#else
    typename Parts<V>::Marks given;
    std::memcpy(&given, marks, sizeof given);
    return __builtin_convertvector(given, typename Parts<V>::Lanes) != 0 ? where_set : otherwise;
#endif
  }
}

// The nearest finite number; NaN becomes some finite number.
template <class V>
[[gnu::always_inline]] inline V finite(V value) {
  constexpr lane_t<V> most = std::numeric_limits<lane_t<V>>::max();
#if defined(__AVX512DQ__)
  if constexpr (std::is_same_v<V, Singles>) return (V)_mm512_range_ps((__m512)value, _mm512_set1_ps(most), 2);
#endif
  const V bounded = value < V{} + most ? value : V{} + most;
  return bounded > V{} - most ? bounded : V{} - most;
}

struct TwoDoubles {
  Doubles low, high;
};
[[gnu::always_inline]] inline TwoDoubles widened(Singles value) {
#if defined(__AVX512F__)
  return {(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)value)),
          (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)value, 1))};
#else
  Floats parts[2];
  std::memcpy(parts, &value, sizeof value);
  return {widened(parts[0]), widened(parts[1])};
#endif
}

// The sum of its two halves.
[[gnu::always_inline]] inline Doubles folded(Singles value) {
  const TwoDoubles parts = widened(value);
  return parts.low + parts.high;
}
[[gnu::always_inline]] inline Doubles folded(Doubles value) { return value; }

// Add each lane to the double at its place.
template <class V>
[[gnu::always_inline]] inline void accumulate(V value, double* to) {
  if constexpr (Parts<V>::count == 1) {
    *to += value;
  } else if constexpr (sizeof(lane_t<V>) == sizeof(double)) {
    store(load<Doubles>(to) + value, to);
  } else {
    const TwoDoubles parts = widened(value);
    store(load<Doubles>(to) + parts.low, to);
    store(load<Doubles>(to + lanes) + parts.high, to + lanes);
  }
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

#if defined(__F16C__)
[[gnu::always_inline]] inline void widen_run(const float16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = widen(from[i]);
}
#endif

}  // namespace
