// Blocks of operands as the arithmetic wants them: in float or double, valid everywhere, in runs that are not too short.
//
// Where memory already looks like that, a block is computed on in place. Half precision, masks and short planes are gathered
// into buffers in the level 1 cache and scattered back; so there is one set of loops, not one for each of them.
#pragma once

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
  bool direct;        // operands are computed on where they lie
  int64_t limit;      // elements of a block; 0: a whole unit at once
  alignas(64) S buffer[6][block_elements + 16];  // apart by no power of two: equal low bits of addresses make loads wait

  Stage(const Plan& given, bool curved) : plan(given) {
    const bool long_runs = plan.rows || plan.task.channels == 1 || plan.length >= short_plane;
    direct = sizeof(T) == sizeof(S) && plan.task.mask == nullptr && long_runs;
    limit = direct && !curved ? 0 : block_elements;
  }

  template <class F>
  void for_each_block(const Unit& unit, F&& work) const {
    if (limit == 0) return work(unit);
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
    if (repeat == 1) return {{{{block.rows, block.width, direct ? plan.ahead : 0}, 0, 1}, {}}, 1};
    const int64_t whole = block.rows / repeat, done = whole * repeat * block.width;
    const Tile head{{whole, block.width * repeat}, 0, repeat};
    const Tile tail{{1, (block.rows - whole * repeat) * block.width}, done, 1};
    return {{head, tail}, 2};
  }

  const uint8_t* mask_of(const Unit& block, int64_t r) const {
    return plan.task.mask + block.position + (plan.rows ? r : r * plan.length);
  }

  // Contiguous, and nothing to look up run by run.
  bool whole(const Unit& block) const { return block.stride == block.width && plan.task.mask == nullptr && plan.rows; }

  // What an earlier pass has left in an output, with no conversion: for g, which lies where dx will.
  void keep(Runs<const S> values, void* base, const Unit& block) const {
    T* to = static_cast<T*>(base) + block.offset;
    for (int64_t r = 0; r < block.rows; ++r) narrow_run(values.row(r), to + r * block.stride, block.width);
  }
  Runs<const S> kept(const void* base, const Unit& block, int slot) {
    const T* from = static_cast<const T*>(base) + block.offset;
    for (int64_t r = 0; r < block.rows; ++r)
      widen_run(from + r * block.stride, buffer[slot] + r * block.width, block.width);
    return {buffer[slot], block.width};
  }

  // `fill` is what stands at invalid positions: a coefficient for each channel, or null for 0.
  Runs<const S> input(const void* base, const Unit& block, int slot, const double* fill = nullptr) {
    const T* from = static_cast<const T*>(base) + block.offset;
    if constexpr (sizeof(T) == sizeof(S))
      if (direct) return {from, block.stride};
    S* to = buffer[slot];
    if (whole(block)) {
      widen_run(from, to, block.rows * block.width);
      return {to, block.width};
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      S* run = to + r * block.width;
      fetch_ahead(from + r * block.stride, {1, block.width, plan.ahead});
      widen_run(from + r * block.stride, run, block.width);
      if (plan.task.mask == nullptr) continue;
      const uint8_t* valid = mask_of(block, r);
      for (int64_t i = 0; i < block.width; ++i)
        if (!valid[plan.rows ? 0 : i]) run[i] = fill == nullptr ? S(0) : S(fill[plan.rows ? i : 0]);
    }
    return {to, block.width};
  }

  Runs<S> output(void* base, const Unit& block, int slot) {
    if constexpr (sizeof(T) == sizeof(S))
      if (direct) return {static_cast<T*>(base) + block.offset, block.stride};
    return {buffer[slot], block.width};
  }

  void finish_output(void* base, const Unit& block, int slot) {
    if (direct) return;
    T* to = static_cast<T*>(base) + block.offset;
    if (whole(block)) return narrow_run(buffer[slot], to, block.rows * block.width);
    for (int64_t r = 0; r < block.rows; ++r) {
      S* run = buffer[slot] + r * block.width;
      fetch_ahead(to + r * block.stride, {1, block.width, plan.ahead});
      if (plan.task.mask != nullptr) {
        const uint8_t* valid = mask_of(block, r);
        for (int64_t i = 0; i < block.width; ++i)
          if (!valid[plan.rows ? 0 : i]) run[i] = 0;
      }
      narrow_run(run, to + r * block.stride, block.width);
    }
  }
};

template <class S>
inline Runs<S> seen(Runs<S> runs, const Tile& tile) {
  return {runs.data + tile.skip, runs.stride * tile.factor};
}

}  // namespace
