// Blocks of operands as the arithmetic wants them: in float or double, in runs that are not too short, with a mark for each element.
//
// Where memory already looks like that, a block is computed on in place. Short planes of few channels or samples, and half precision
// where its channel is badly scaled or its activation curved, are gathered into buffers in the level 1 cache and scattered back; so
// there is one set of loops, not one for each of them.
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

constexpr bool summing = true;

template <class T>
struct Stage {
  using S = compute_t<T>;
  const Plan& plan;
  const bool curved, direct;  // direct: a block is computed on where it lies
  const bool sums;            // it is read to be summed
  alignas(64) S buffer[6][block_elements + 16];  // apart by no power of two: equal low bits of addresses make loads wait
  // Which elements of a block are valid, where the mask does not tell it as it lies; a row is written past its end.
  alignas(64) uint8_t marks[marked_elements + sizeof(Bytes)];
  const uint8_t* valid = nullptr;
  int64_t valid_stride = 0;
  int64_t following = 0;  // the offset of the block that comes next

  Stage(const Plan& given, bool is_curved, bool in_doubles, bool is_sums = false)
      : plan(given), curved(is_curved), direct(fits_in_place(given, is_curved, in_doubles)), sums(is_sums) {}

  static bool fits_in_place(const Plan& plan, bool curved, bool in_doubles) {
    const bool cached = plan.task.samples * plan.task.channels * plan.length <= cached_elements;
    const bool long_runs = plan.rows || plan.task.channels == 1 || plan.length >= (cached ? short_in_cache : short_plane);
    return long_runs && (sizeof(T) == sizeof(S) || (!curved && !in_doubles));
  }

  // Outputs are written once, past the caches, and not read again.
  bool stream() const { return plan.stream && !(direct && curved); }

  template <class F>
  void for_each_block(const Unit& unit, F&& work) {
    const bool marked = plan.task.mask != nullptr && plan.rows && plan.spread == 1;
    if (direct && !curved && !marked) {  // one block: nothing is put beside it
      mark(unit);
      return work(unit);
    }
    const int64_t limit = direct && !curved ? marked_elements : block_elements;
    const bool parts = unit.width > limit;  // of runs; else some runs
    const int64_t runs = limit / larger(1, unit.width), part = parts ? divide_up(unit.width, limit) : 1;
    const int64_t together = parts ? 1 : larger(1, plan.rows ? runs / plan.repeat * plan.repeat : runs);
    const int64_t count = divide_up(unit.rows, together) * part;
    const auto block = [&](int64_t k) {
      const int64_t r = parts ? k / part : k * together, i = parts ? k % part * limit : 0;
      return Unit{unit.offset + r * unit.stride + i, smaller(together, unit.rows - r), smaller(limit, unit.width - i), unit.stride,
                  unit.position + (plan.rows ? r : r * plan.length) + i};
    };
    for (int64_t k = 0; k < count; ++k) {
      const Unit here = block(k);
      following = k + 1 < count ? block(k + 1).offset : here.offset;
      mark(here);
      work(here);
    }
  }

  // Where the next block's row r lies, for fetching.
  const char* next_row(const void* base, const Unit& here, int64_t r) const {
    return base == nullptr || following == here.offset ? nullptr
                                                       : reinterpret_cast<const char*>(static_cast<const T*>(base) + following + r * here.stride);
  }

  // Long planes and samples that are rows have marks beside them; the others' are put there.
  void mark(const Unit& block) {
    if (plan.task.mask == nullptr) return;
    const uint8_t* from = plan.task.mask + block.position;
    if (plan.spread > 1) {
      valid_stride = plan.column_width * plan.spread;
      valid = plan.marks + block.position * valid_stride;
      return;
    }
    valid = plan.rows || !direct ? marks : from;
    valid_stride = plan.rows || !direct ? block.width : plan.length;
    if (valid == from) return;
    for (int64_t r = 0; r < block.rows; ++r) {
      uint8_t* to = marks + r * block.width;
      if (plan.rows) {  // a call would take longer than a short row
        const Bytes all = from[r] - Bytes{};
        for (int64_t i = 0; i < block.width; i += int64_t(sizeof all)) std::memcpy(to + i, &all, sizeof all);
      } else {
        std::memcpy(to, from + r * plan.length, size_t(block.width));
      }
    }
  }

  // See Extent.
  int64_t ahead_of(const Unit& block) const {
    if (!plan.rows) return sums ? plan.next_sample : plan.next_panel;
    if (plan.small) return 0;
    return plan.spread > 1 ? block.width : fetched_rows * plan.repeat * block.stride;
  }

  Tiles tiles(const Unit& block) const {
    const int64_t repeat = plan.repeat, all = block.rows * block.width;
    const auto one = [](const Extent& extent) { return Tiles{{{extent, 0, 1}, {}}, 1}; };
    if (!plan.rows && !direct) return one({.rows = 1, .width = all, .valid = valid});
    Extent given{.rows = block.rows, .width = block.width, .valid = valid, .valid_stride = valid_stride};
    given.stream = direct && stream();
    given.ahead = direct ? ahead_of(block) : 0;
    given.apart = direct && !curved && plan.rows && plan.spread == 1 && block.stride > block.width;
    if (repeat == 1) return one(given);
    const int64_t whole = block.rows / repeat, done = whole * repeat * block.width;
    const Tile tail{{.rows = 1, .width = all - done, .valid = valid == nullptr ? nullptr : valid + done}, done, 1};
    given.rows = whole;
    given.width *= repeat;
    given.valid_stride *= repeat;
    const Tile head{given, 0, repeat};
    return {{head, tail}, 2};
  }

  // An input that will be written over while it is read. Where runs end within a vector it is copied: the one that ends them would
  // meet again what the one before it has written.
  Runs replaced_input(void* base, const Unit& block, int slot) {
    if (!direct || block.width % Parts<Singles>::count == 0) return input(base, block, slot);
    for (int64_t r = 0; r < block.rows; ++r)
      widen_run(static_cast<T*>(base) + block.offset + r * block.stride, buffer[slot] + r * block.width, block.width);
    return {buffer[slot], block.width};
  }

  Runs input(const void* base, const Unit& block, int slot) {
    const T* from = static_cast<const T*>(base) + block.offset;
    if (direct) return {const_cast<T*>(from), block.stride};
    S* to = buffer[slot];
    if (block.stride == block.width) {
      widen_run(from, to, block.rows * block.width);
    } else {
      for (int64_t r = 0; r < block.rows; ++r) {
        if (plan.next_gathered != 0) fetch_run(from + r * block.stride + plan.next_gathered, block.width);
        widen_run(from + r * block.stride, to + r * block.width, block.width);
      }
    }
    return {to, block.width};
  }

  Runs output(void* base, const Unit& block, int slot) {
    if (direct) return {static_cast<T*>(base) + block.offset, block.stride};
    return {buffer[slot], block.width};
  }

  // 0 where nothing is valid: an activation of 0, or its slope, may be something else.
  void clear_invalid(Runs values, const Unit& block) const {
    if (valid == nullptr) return;
    for (int64_t r = 0; r < block.rows; ++r) {
      S* __restrict run = values.row<S>(r);
      const uint8_t* __restrict counts = valid + r * valid_stride;
      for (int64_t i = 0; i < block.width; ++i) run[i] = counts[i] ? run[i] : S(0);
    }
  }

  void finish_output(void* base, const Unit& block, int slot) {
    if (direct) return;
    T* to = static_cast<T*>(base) + block.offset;
    if (block.stride == block.width) return copy_out(buffer[slot], to, block.rows * block.width, stream());
    for (int64_t r = 0; r < block.rows; ++r) {
      if (plan.next_gathered != 0 && !stream()) fetch_run(to + r * block.stride + plan.next_gathered, block.width);
      copy_out(buffer[slot] + r * block.width, to + r * block.stride, block.width, stream());
    }
  }
};

template <class E>
inline Runs seen(Runs runs, const Tile& tile) {
  return {runs.data == nullptr ? nullptr : runs.row<E>(0) + tile.skip, runs.stride * tile.factor};
}

}  // namespace
