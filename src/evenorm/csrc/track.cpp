// One batch enters the running statistics. The definition is evenorm.updates.commit_; this is its copy for one call.

#include <cmath>
#include <limits>

#include "engine.h"

namespace evenorm {

static double weight_of(const Update& update) {
  const bool cumulative = std::isnan(update.momentum);
  if (!cumulative && !update.debias) return update.momentum;
  if (update.batches == nullptr) return 0;
  const double batches = double(*update.batches) + 1;  // with this one
  return cumulative ? 1 / batches : update.momentum / (1 - std::pow(1 - update.momentum, batches));
}

struct Pooled {
  double mean, m2;
};

// Chan's rule over the groups of a channel, from the first group's mean so that equal means merge to themselves.
static Pooled pooled(const Update& update, int64_t c, double count) {
  const double start = read(update.mean, 0, c);
  if (update.groups == 1) return {start, read(update.m2, 0, c)};
  double step = 0, m2 = 0;
  for (int64_t g = 0; g < update.groups; ++g) step += read(update.count, g, 0) * (read(update.mean, g, c) - start);
  const double mean = start + step / count;
  for (int64_t g = 0; g < update.groups; ++g) {
    const double away = read(update.mean, g, c) - mean;
    m2 += read(update.m2, g, c) + read(update.count, g, 0) * away * away;
  }
  return {mean, m2};
}

// The finiteness that counts is that of the stored value: a float16 buffer overflows where a double does not.
static bool stays_finite(double value, Type type) {
  switch (type) {
    case Type::float64: return std::isfinite(value);
    case Type::float16: return std::fabs(value) < 65520.0;
    case Type::bfloat16: return std::fabs(value) < 0x1.ffp127;
    case Type::float32: return std::isfinite(float(value));
  }
  return false;
}

void track(const Update& update) {
  double count = 0;
  for (int64_t g = 0; g < update.groups; ++g) count += read(update.count, g, 0);
  if (!(count > 1)) return;  // one value has no unbiased variance
  const double weight = weight_of(update);
  int64_t skipped = 0;
  for (int64_t c = 0; c < update.channels; ++c) {
    const Pooled batch = pooled(update, c, count);
    const double old_mean = read(update.running_mean, 0, c), old_var = read(update.running_var, 0, c);
    const double mean = old_mean + weight * (batch.mean - old_mean);
    const double var = old_var + weight * (batch.m2 / (count - 1) - old_var);
    const bool finite = stays_finite(mean, update.running_mean.type) && stays_finite(var, update.running_var.type);
    if (update.skip_nonfinite && !finite) {
      skipped += 1;
      if (update.skipped != nullptr && update.skipped_stride != 0) update.skipped[c * update.skipped_stride] += 1;
      continue;
    }
    write(update.running_mean, 0, c, mean);
    write(update.running_var, 0, c, var);
  }
  // A batch that no channel took does not count.
  if (update.batches != nullptr && skipped < update.channels) *update.batches += 1;
  // One counter for all channels counts batches.
  if (update.skipped != nullptr && update.skipped_stride == 0 && skipped > 0) *update.skipped += 1;
}

}  // namespace evenorm
