// Running statistics and the rule of their update, as operators take them. For binding.cpp alone.
#pragma once

#include "views.h"

namespace {

int64_t* counter(const View& given, const char* name) {
  CHECK(!given || given.code == types().int64, name, " must be int64");
  return static_cast<int64_t*>(given.data);
}

// Running statistics, where there are any, and how a batch enters them.
struct Tracked {
  View running_mean, running_var, batches, skipped;
  evenorm::Update update;

  // running_mean!?, running_var!?, num_batches_tracked!?
  void statistics(Arguments& given) {
    running_mean = given.optional_tensor();
    running_var = given.optional_tensor();
    batches = given.optional_tensor();
    CHECK(bool(running_mean) == bool(running_var), "running_mean and running_var must be given together");
    if (!running_mean) return;
    CHECK(running_mean.dim == 1, "running_mean must have shape (C,)");
    update.channels = running_mean.sizes[0];
    update.running_mean = values(running_mean, 1, update.channels, "running_mean");
    update.running_var = values(running_var, 1, update.channels, "running_var");
    update.batches = counter(batches, "num_batches_tracked");
  }

  // momentum, debias, skip_nonfinite, skipped!?
  void rule(Arguments& given) {
    update.momentum = given.number();
    update.debias = given.flag();
    update.skip_nonfinite = given.flag();
    skipped = given.optional_tensor();
    update.skipped = counter(skipped, "skipped");
    CHECK(!skipped || skipped.dim == 0, "skipped must have shape ()");
  }
};

}  // namespace
