// Rows in which several elements share a channel: coefficients and sums, one for each element while they are computed with.
#pragma once

#include <initializer_list>

#include "plan.h"

namespace {

// Of the channels of one column. Where an element is a channel these are the plan's own, untouched.
struct Spread {
  static constexpr int64_t pitch = widest_spread + 16;
  const Plan& plan;
  const Span span;
  const Coefficients given;
  alignas(64) double doubles[kinds * pitch];
  alignas(64) float singles[kinds * pitch];
  alignas(64) double sums[2][pitch];

  Spread(const Plan& of, Span channels, Coefficients theirs) : plan(of), span(channels), given(theirs) {}

  Coefficients coefficients() const { return plan.spread == 1 ? given : Coefficients{doubles, singles, pitch}; }

  void fill(bool in_doubles, std::initializer_list<Kind> wanted) {
    if (plan.spread == 1) return;
    for (const Kind kind : wanted) {
      if (in_doubles) fill(given.doubles + kind * given.pitch, doubles + kind * pitch);
      else fill(given.singles + kind * given.pitch, singles + kind * pitch);
    }
  }

  // Where to add up what then belongs to a row of sums.
  double* cleared(int which, double* row) {
    double* at = plan.spread == 1 ? row : sums[which];
    const int64_t count = span.count * plan.spread * plan.repeat;
    for (int64_t i = 0; i < count; ++i) at[i] = 0;
    return at;
  }

  void finish(int which, double* row) const {
    if (plan.spread == 1) return;
    for (int64_t c = 0; c < span.count; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < plan.spread; ++i) sum += sums[which][c * plan.spread + i];
      row[c] = sum;
    }
  }

 private:
  template <class Number>
  void fill(const Number* __restrict from, Number* __restrict to) const {
    for (int64_t c = 0; c < span.count; ++c)
      for (int64_t i = 0; i < plan.spread; ++i) to[c * plan.spread + i] = from[c];
  }
};

}  // namespace
