// Blocks of operands as the arithmetic wants them: in float or double, valid everywhere, in runs that are not too short.
//
// Where memory already looks like that, a block is computed on in place. Short planes, half precision where its channel is badly
// scaled or its activation curved, and what a mask has holes in, are gathered into buffers in the level 1 cache and scattered back;
// so there is one set of loops, not one for each of them.
#pragma once

#include <cstring>

#include "blocks.h"
#include "plan.h"

namespace {

template <class T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};
template <class T>
using compute_t = typename Compute<T>::Type;

// A block seen by a loop: few channels are seen `repeat` rows at a time, gathered planes as one run.
struct Tile {
  Extent extent;
  int64_t skip;    // elements before it
  int64_t factor;  // of the stride
};

struct Tiles {
  Tile tile[2];
  int count;
};

template <class T>
struct Stage {
  using S = compute_t<T>;
  const Plan& plan;
  const bool curved, in_place;  // in_place: a block without holes is computed on where it lies
  bool direct;                  // this one is
  bool empty = false;           // it holds nothing valid
  alignas(64) S buffer[6][block_elements + 16];  // apart by no power of two: equal low bits of addresses make loads wait

  Stage(const Plan& given, bool is_curved, bool in_doubles)
      : plan(given), curved(is_curved), in_place(fits_in_place(given, is_curved, in_doubles)), direct(in_place) {}

  static bool fits_in_place(const Plan& plan, bool curved, bool in_doubles) {
    const bool cached = plan.task.samples * plan.task.channels * plan.length <= cached_elements;
    const bool long_runs = plan.rows || plan.task.channels == 1 || plan.length >= (cached ? short_in_cache : short_plane);
    return long_runs && (sizeof(T) == sizeof(S) || (!curved && !in_doubles));
  }

  // Outputs are written once, past the caches, and not read again.
  bool stream() const { return plan.stream && !(direct && curved); }

  template <class F>
  void for_each_block(const Unit& unit, F&& work) {
    if (plan.task.mask == nullptr) return cut(unit, work);
    if (!in_place || (!plan.rows && plan.length < split_plane)) {
      direct = false;
      return cut(unit, work);
    }
    const int64_t spans = plan.rows ? 1 : unit.rows, count = plan.rows ? unit.rows : unit.width;
    for (int64_t r = 0; r < spans; ++r) {
      const uint8_t* valid = mask_of(unit, r);
      for (int64_t i = 0; i < count;) {
        const int64_t end = i + even_part(valid + i, count - i, larger(1, unit.width));
        if (plan.rows) cut(Unit{unit.offset + i * unit.stride, end - i, unit.width, unit.stride, unit.position + i}, work);
        else cut(Unit{unit.offset + r * unit.stride + i, 1, end - i, unit.stride, unit.position + r * plan.length + i}, work);
        i = end;
      }
    }
  }

  // The length of a first part of a mask: valid throughout and worth computing in place, or nowhere, or else what comes before
  // such a part. Parts begin where an output may be streamed from.
  int64_t even_part(const uint8_t* valid, int64_t count, int64_t width) {
    const int64_t line = plan.rows ? plan.repeat : int64_t(64 / sizeof(T)), grain = plan.stream ? line : 1;
    const int64_t shortest = plan.rows ? larger(2 * grain, divide_up(4 * short_plane, width)) : 2 * short_plane;
    const int64_t run = run_of(valid, count), whole = run == count ? run : run / grain * grain;
    direct = whole >= shortest && valid[0] != 0;
    empty = whole >= shortest && valid[0] == 0;
    if (direct || empty) return whole;
    const int64_t next = divide_up(run, grain) * grain;
    if (next < count && run_of(valid + next, count - next) >= shortest) return next;
    return smaller(count, plan.rows ? larger(1, block_elements / width / grain) * grain : block_elements);
  }

  static int64_t run_of(const uint8_t* valid, int64_t count) {
    const void* end = std::memchr(valid, valid[0] == 0, size_t(count));
    return end == nullptr ? count : static_cast<const uint8_t*>(end) - valid;
  }

  // Zeros for an output of a block that holds nothing valid.
  void clear(void* base, const Unit& block) const {
    T* to = static_cast<T*>(base) + block.offset;
    for (int64_t r = 0; r < block.rows; ++r) std::memset(static_cast<void*>(to + r * block.stride), 0, sizeof(T) * size_t(block.width));
  }

  // In place a unit is one block, unless an activation needs z beside it.
  template <class F>
  void cut(const Unit& unit, F&& work) const {
    constexpr int64_t limit = block_elements;
    if ((direct && !curved) || empty) return work(unit);
    if (unit.width > limit) {
      for (int64_t r = 0; r < unit.rows; ++r)
        for (int64_t i = 0; i < unit.width; i += limit)
          work(Unit{unit.offset + r * unit.stride + i, 1, smaller(limit, unit.width - i), unit.stride,
                    unit.position + (plan.rows ? r : r * plan.length + i)});
      return;
    }
    const int64_t fit = limit / larger(1, unit.width);
    const int64_t count = larger(1, plan.rows ? fit / plan.repeat * plan.repeat : fit);
    for (int64_t r = 0; r < unit.rows; r += count)
      work(Unit{unit.offset + r * unit.stride, smaller(count, unit.rows - r), unit.width, unit.stride,
                unit.position + (plan.rows ? r : r * plan.length)});
  }

  Tiles tiles(const Unit& block) const {
    if (!plan.rows && !direct) return {{{{1, block.rows * block.width}, 0, 1}, {}}, 1};
    const int64_t repeat = plan.repeat;
    if (repeat == 1) return {{{{block.rows, block.width, direct ? plan.ahead : 0, direct && stream()}, 0, 1}, {}}, 1};
    const int64_t whole = block.rows / repeat, done = whole * repeat * block.width;
    const Tile head{{whole, block.width * repeat, 0, direct && stream()}, 0, repeat};
    const Tile tail{{1, (block.rows - whole * repeat) * block.width}, done, 1};
    return {{head, tail}, 2};
  }

  const uint8_t* mask_of(const Unit& block, int64_t r) const {
    return plan.task.mask + block.position + (plan.rows ? r : r * plan.length);
  }

  // What an earlier pass has left in an output, with no conversion: for g, which lies where dx will.
  void keep(Runs values, void* base, const Unit& block) const {
    T* to = static_cast<T*>(base) + block.offset;
    for (int64_t r = 0; r < block.rows; ++r) copy_out(values.row<S>(r), to + r * block.stride, block.width, false);
  }
  Runs kept(const void* base, const Unit& block, int slot) {
    const T* from = static_cast<const T*>(base) + block.offset;
    for (int64_t r = 0; r < block.rows; ++r)
      widen_run(from + r * block.stride, buffer[slot] + r * block.width, block.width);
    return {buffer[slot], block.width};
  }

  // `fill` is what stands at invalid positions: a coefficient for each channel, or null for 0.
  Runs input(const void* base, const Unit& block, int slot, const double* fill = nullptr) {
    const T* from = static_cast<const T*>(base) + block.offset;
    if (direct) return {const_cast<T*>(from), block.stride};
    S* to = buffer[slot];
    const bool masked = plan.task.mask != nullptr;
    if (plan.rows && block.stride == block.width) {
      widen_run(from, to, block.rows * block.width);
    } else {
      for (int64_t r = 0; r < block.rows; ++r) {
        fetch_ahead(from + r * block.stride, {1, block.width, plan.ahead});
        if (masked && !plan.rows) {
          widen_valid(from + r * block.stride, to + r * block.width, mask_of(block, r), block.width, fill);
        } else {
          widen_run(from + r * block.stride, to + r * block.width, block.width);
        }
      }
    }
    if (masked && plan.rows) blank_rows(to, block, fill);
    return {to, block.width};
  }

  static void widen_valid(const T* __restrict from, S* __restrict to, const uint8_t* valid, int64_t width, const double* fill) {
    const S blank = fill == nullptr ? S(0) : S(*fill);
    for (int64_t i = 0; i < width; ++i) to[i] = valid[i] ? S(widen(from[i])) : blank;
  }

  // By selecting, not by branching: no processor foresees a mask, and a row of few channels takes less time than a wrong guess.
  void blank_rows(S* data, const Unit& block, const double* fill) const {
    using V = vector_t<S>;
    const uint8_t* valid = mask_of(block, 0);
    for (int64_t r = 0; r < block.rows; ++r) {
      S* row = data + r * block.width;
      const auto keep = typename Parts<V>::Lanes{} - valid[r];
      int64_t i = 0;
      for (; i + Parts<V>::count <= block.width; i += Parts<V>::count) {
        S blank[Parts<V>::count] = {};
        if (fill != nullptr)
          for (int lane = 0; lane < Parts<V>::count; ++lane) blank[lane] = S(fill[i + lane]);
        store(keep ? load<V>(row + i) : load<V>(blank), row + i);
      }
      for (; i < block.width; ++i) row[i] = valid[r] ? row[i] : (fill == nullptr ? S(0) : S(fill[i]));
    }
  }

  Runs output(void* base, const Unit& block, int slot) {
    if (direct) return {static_cast<T*>(base) + block.offset, block.stride};
    return {buffer[slot], block.width};
  }

  void finish_output(void* base, const Unit& block, int slot) {
    if (direct) return;
    T* to = static_cast<T*>(base) + block.offset;
    const bool masked = plan.task.mask != nullptr;
    if (masked && plan.rows) blank_rows(buffer[slot], block, nullptr);
    if (plan.rows && block.stride == block.width) return copy_out(buffer[slot], to, block.rows * block.width, stream());
    for (int64_t r = 0; r < block.rows; ++r) {
      S* run = buffer[slot] + r * block.width;
      if (!stream()) fetch_ahead(to + r * block.stride, {1, block.width, plan.ahead});
      if (masked && !plan.rows) keep_valid(run, mask_of(block, r), block.width);
      copy_out(run, to + r * block.stride, block.width, stream());
    }
  }

  static void keep_valid(S* __restrict run, const uint8_t* __restrict valid, int64_t width) {
    for (int64_t i = 0; i < width; ++i) run[i] = valid[i] ? run[i] : S(0);
  }
};

template <class E>
inline Runs seen(Runs runs, const Tile& tile) {
  return {runs.data == nullptr ? nullptr : runs.row<E>(0) + tile.skip, runs.stride * tile.factor};
}

}  // namespace
